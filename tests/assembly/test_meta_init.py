# SPDX-License-Identifier: Apache-2.0
"""Modules built without memory are the modules, and starting a run holds a rank's share and little more."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_bagel.assembly.meta_init import materialize, on_meta
from megatron_bagel.checkpoint.hf.folder import WeightFile, write_folder
from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights
from megatron_bagel.checkpoint.hf.load import load_weights, named_weights
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.positions import sincos_2d
from tests.checkpoint.hf.test_weight_map import tiny_arch
from tests.distributed import run_ranks


def _built(tied: bool) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    arch = tiny_arch(tied=tied)
    config = transformer_config(arch.llm, bf16=True)
    with on_meta():
        lazy = [build_decoder(arch, config), VisionTower(arch)]
    assert all(parameter.is_meta for module in lazy for parameter in module.parameters())
    eager = [build_decoder(arch, config), VisionTower(arch)]
    for module in lazy:
        materialize(module, torch.device("cpu"), torch.bfloat16)
    for module in eager:
        module.bfloat16()
    return lazy, eager


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("tied", [False, True])
def test_built_without_memory_is_the_same_module(tied: bool) -> None:
    lazy, eager = _built(tied)
    for ours, theirs in zip(lazy, eager, strict=True):
        named, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
        assert named.keys() == expected.keys()
        for name, parameter in named.items():
            assert (parameter.shape, parameter.dtype, parameter.requires_grad) == (expected[name].shape, torch.bfloat16, True)
            assert parameter.__dict__ == expected[name].__dict__, name
        for (name, table), (_, other) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
            assert torch.equal(table, other), name


def _large_arch() -> BagelArch:
    """78 million parameters, the largest tensor a fifth of them."""
    arch = tiny_arch()
    return replace(arch, llm=replace(arch.llm, hidden_size=512, intermediate_size=2048, vocab_size=30_000, num_hidden_layers=6))


def _write_folder(folder: Path) -> None:
    arch = _large_arch()
    entries = WeightMap(arch).entries
    write_folder(folder, arch, {"ema": WeightFile(lambda name: torch.ones(entries[name].shape), "fp32")}, sincos_2d)


def _peak_of_a_start(folder: Path | None, megatron: MegatronArguments) -> tuple[int, int, int]:
    """(bytes above the start at the peak, of this rank's parameters, of the largest whole tensor)."""
    arch = _large_arch()
    weight_map, config = WeightMap(arch), transformer_config(arch.llm, megatron)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with on_meta():
        modules = [build_decoder(arch, config, first, last), VisionTower(arch)]
    for module in modules:
        materialize(module, torch.device("cpu"), torch.float32)
    if folder is None:
        InitialWeights.of(arch, 1, None, None, copy_init_moe=True).fill(modules)
    else:
        load_weights(SafetensorsReader(folder / "ema.safetensors"), weight_map, modules)
        assert all((parameter == 1).all() for parameter in named_weights(modules).values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    held = sum(parameter.numel() * 4 for parameter in named_weights(modules).values())
    return peak, held, max(torch.Size(entry.shape).numel() * 4 for entry in weight_map.entries.values())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stored", "sizes"),
    [(False, {}), (True, {"tensor_model_parallel_size": 2}), (True, {"pipeline_model_parallel_size": 2})],
    ids=["seeded", "folder-tp2", "folder-pp2"],
)
def test_a_start_holds_the_share_of_a_rank_and_little_more(tmp_path: Path, stored: bool, sizes: dict[str, int]) -> None:
    folder = tmp_path / "hf" if stored else None
    if folder is not None:
        run_ranks(_write_folder, 1, folder)  # not here: memory that this process has freed would not show in its children
    for peak, share, largest in run_ranks(_peak_of_a_start, 2 if sizes else 1, folder, MegatronArguments(**sizes), parallel=sizes):
        assert share > 1.5 * largest + 40e6, "a second copy of the share would not be noticed"
        assert peak < share + 1.5 * largest + 25e6
