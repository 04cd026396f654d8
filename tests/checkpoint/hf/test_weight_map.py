# SPDX-License-Identifier: Apache-2.0
"""The weight map names exactly the released tensors, and fusing is undone exactly by splitting, for every layer kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch

KINDS = ("Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer")


def tiny_arch(kind: str = "Qwen2MoTDecoderLayer", tied: bool = False, qk_norm: bool = True, heads: int = 4, kv: int = 2) -> BagelArch:
    llm = LLMArch(
        hidden_size=8 * heads,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=40,
        tie_word_embeddings=tied,
        qk_norm=qk_norm,
        layer_module=kind,
    )
    vit = ViTArch(hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=56)
    return BagelArch(llm, vit, AutoencoderArch(ch=32), max_latent_size=4, vit_max_num_patch_per_side=4)


def test_names_and_shapes_of_the_tiny_model(goldens: Path) -> None:
    recorded = json.loads((goldens / "names_shapes.json").read_text())["model"]
    shapes = WeightMap(BagelArch.from_hf_folder(goldens / "hf")).hf_shapes()
    assert shapes == {name: tuple(shape) for name, (shape, _, _) in recorded.items()}


def test_names_and_shapes_at_released_size(goldens: Path) -> None:
    recorded = json.loads((goldens / "names_shapes_7b.json").read_text())
    arch = BagelArch(
        LLMArch.from_hf(recorded["assumed_llm"]), ViTArch.from_hf(recorded["assumed_vit"]), AutoencoderArch(), max_latent_size=64
    )
    shapes = WeightMap(arch).hf_shapes()
    # The file lists layer 0 of each stack; the others repeat it.
    assert {n: s for n, s in shapes.items() if ".layers." not in n or ".layers.0." in n} == {
        name: tuple(shape) for name, shape in recorded["model"].items()
    }
    assert len(shapes) == 1223
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == recorded["total_params"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_layer_kinds_duplicate_what_the_reference_duplicates(kind: str, tied: bool) -> None:
    weight_map = WeightMap(tiny_arch(kind, tied))
    names = set(weight_map.hf_shapes())
    assert "language_model.lm_head.weight" in names, "the original's state dict has it, tied or not"
    assert ("output_layer.weight" in weight_map.entries) is not tied
    assert ("language_model.model.layers.1.self_attn.q_proj_moe_gen.weight" in names) is (kind == KINDS[2])
    assert ("language_model.model.layers.1.input_layernorm_moe_gen.weight" in names) is (kind == KINDS[2])
    assert ("language_model.model.layers.1.mlp_moe_gen.up_proj.weight" in names) is (kind != KINDS[0])
    assert ("language_model.model.norm_moe_gen.weight" in names) is (kind != KINDS[0])


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    tied=st.booleans(),
    qk_norm=st.booleans(),
    sizes=st.sampled_from([(4, 2), (4, 4), (6, 2), (6, 1)]),
)
def test_split_undoes_fuse_exactly(kind: str, tied: bool, qk_norm: bool, sizes: tuple[int, int]) -> None:
    arch = tiny_arch(kind, tied, qk_norm, *sizes)
    for entry in WeightMap(arch).entries.values():
        parts = [torch.randn(shape) for shape in entry.hf_shapes]
        fused = entry.fuse(parts)
        assert tuple(fused.shape) == entry.shape
        for part, back in zip(parts, entry.unfuse(fused), strict=True):
            assert torch.equal(part, back)


def test_fused_qkv_is_grouped_by_key_value_head() -> None:
    arch = tiny_arch(heads=6, kv=2)
    entry = WeightMap(arch).entries["decoder.layers.0.self_attention.und.linear_qkv.bias"]
    q, k, v = torch.arange(48.0), 100 + torch.arange(16.0), 200 + torch.arange(16.0)
    expected = torch.cat([q[:24], k[:8], v[:8], q[24:], k[8:], v[8:]])
    assert torch.equal(entry.fuse([q, k, v]), expected)


def test_every_hugging_face_name_belongs_to_one_parameter() -> None:
    weight_map = WeightMap(tiny_arch())
    assert len(weight_map.by_hf) == sum(len(entry.hf) for entry in weight_map.entries.values())
    assert set(weight_map.by_hf).isdisjoint(weight_map.tables)
