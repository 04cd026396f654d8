# SPDX-License-Identifier: Apache-2.0
"""Frozen is exactly what gets no gradient: the flags are held against what a backward pass reaches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_bagel.config.architecture import BagelArch, ViTArch
from megatron_bagel.costs.freezing import FreezeSettings, freeze
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import LayoutSpec, build_pack
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.batch import make_microbatch
from megatron_bagel.model.build import build_decoder
from tests.model.tiny import random_features, tiny_arch, tiny_config

KINDS = ("Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer")


def parts(kind: str, freeze_und: bool = False, **llm: bool) -> tuple[BagelModel, VisionTower]:
    arch = replace(tiny_arch(kind, **llm), vit=ViTArch(16, 24, 2, 2, image_size=28), vit_max_num_patch_per_side=2)
    torch.manual_seed(0)
    decoder = build_decoder(arch, tiny_config(arch), freeze_und=freeze_und)
    torch.nn.init.normal_(decoder.llm2vae.weight)  # zero at first: it would hide what reaches the layers
    tower = VisionTower(arch)
    tower.reset_parameters(torch.Generator().manual_seed(0))
    return decoder, tower


def backward(decoder: BagelModel, tower: VisionTower) -> None:
    """Both losses of one pack that has every kind of token."""
    arch: BagelArch = decoder.arch
    ids = np.array([5, 6, 7])
    items = (
        Item("vit", image=0, height=28, width=14),
        Item("text", ids=ids, loss=True),
        Item("vae", image=1, height=16, width=32, loss=True),
        Item("vae", image=1, height=16, width=32),
        Item("text", ids=ids, loss=True),
    )
    pack = build_pack([Sample("d", 0, 0, items)], LayoutSpec(1, 2, 3, 4, vit_max_side=2, vae_downsample=16, max_latent_size=16))
    features = random_features(pack, arch)
    patches = torch.randn(2, 3 * 14 * 14, generator=torch.Generator().manual_seed(1))
    features.vit = tower(patches, torch.from_numpy(pack.vit_position_ids), [2])
    ce, mse = decoder(make_microbatch(pack, expert_order(pack), features))
    (ce.sum() + mse.sum()).backward()


def trained(decoder: BagelModel, tower: VisionTower) -> set[str]:
    named = [*decoder.named_parameters(), *tower.named_parameters()]
    return {name for name, parameter in named if parameter.requires_grad}


def names(module: torch.nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_freeze_und_freezes_what_no_gradient_reaches(single_rank: None, kind: str, tied: bool) -> None:
    """In a model cut for freeze_und but with everything trainable, the parameters without gradient are those that are frozen."""
    decoder, tower = parts(kind, freeze_und=True, tie_word_embeddings=tied)
    backward(decoder, tower)
    named = [*decoder.named_parameters(), *tower.named_parameters()]
    reached = {name for name, parameter in named if parameter.grad is not None and parameter.grad.abs().max() > 0}
    freeze(decoder, tower, FreezeSettings(und=True))
    assert trained(decoder, tower) == reached
    assert ("embedding.word_embeddings.weight" in reached) == tied


def test_freeze_und_of_mot_leaves_the_generation_expert(single_rank: None) -> None:
    decoder, tower = parts("Qwen2MoTDecoderLayer", freeze_und=True)
    freeze(decoder, tower, FreezeSettings(und=True))
    left = trained(decoder, tower)
    outside = {name for name in names(decoder) if name.startswith(("output_layer", "vae2llm", "llm2vae", "time_embedder"))}
    assert left == {name for name in names(decoder) if ".gen." in name} | outside


@pytest.mark.parametrize("kind", KINDS)
def test_freeze_llm_leaves_the_paths_of_latents_and_the_tower(single_rank: None, kind: str) -> None:
    decoder, tower = parts(kind)
    freeze(decoder, tower, FreezeSettings(llm=True))
    paths = {name for name in names(decoder) if name.startswith(("vae2llm", "llm2vae", "time_embedder"))}
    assert trained(decoder, tower) == paths | names(tower)
    backward(decoder, tower)
    assert all(parameter.grad is not None for parameter in [*decoder.parameters(), *tower.parameters()] if parameter.requires_grad)


def test_freeze_vit_leaves_the_connector(single_rank: None) -> None:
    decoder, tower = parts("Qwen2MoTDecoderLayer")
    freeze(decoder, tower, FreezeSettings(vit=True))
    connector = {f"connector.fc{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    assert trained(decoder, tower) == names(decoder) | connector


def test_no_flag_and_no_tower_change_nothing(single_rank: None) -> None:
    decoder, tower = parts("Qwen2MoTDecoderLayer")
    freeze(decoder, None, FreezeSettings(vit=True))
    freeze(decoder, tower, FreezeSettings())
    assert trained(decoder, tower) == names(decoder) | names(tower)
