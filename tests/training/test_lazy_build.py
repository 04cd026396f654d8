"""Modules built without memory are the modules, and starting a run holds a rank's share and little more."""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest
import torch

from megatron_bagel.checkpoint.first_weights import FirstWeights
from megatron_bagel.checkpoint.weights import named_weights
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.build import build_decoder
from megatron_bagel.training.lazy_build import give_memory, without_memory
from tests.checkpoint.test_weight_map import tiny_arch
from tests.distributed import run_ranks


def _built(tied: bool) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    arch = tiny_arch(tied=tied)
    config = transformer_config(arch.llm, bf16=True)
    with without_memory():
        lazy = [build_decoder(arch, config), VisionTower(arch)]
    assert all(parameter.is_meta for module in lazy for parameter in module.parameters())
    eager = [build_decoder(arch, config), VisionTower(arch)]
    for module in lazy:
        give_memory(module, torch.device("cpu"), torch.bfloat16)
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


def _peak_of_a_start() -> tuple[int, int, int]:
    """(bytes above the start at the peak, of all parameters, of the largest)."""
    arch = tiny_arch()
    arch = replace(arch, llm=replace(arch.llm, hidden_size=512, intermediate_size=2048, vocab_size=20_000, num_hidden_layers=4))
    config = transformer_config(arch.llm)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with without_memory():
        modules = [build_decoder(arch, config), VisionTower(arch)]
    for module in modules:
        give_memory(module, torch.device("cpu"), torch.float32)
    FirstWeights.of(arch, 1, None, None, copy_init_moe=True).fill(modules)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    sizes = [parameter.numel() * 4 for parameter in named_weights(modules).values()]
    return peak, sum(sizes), max(sizes)


@pytest.mark.distributed
def test_a_start_holds_the_share_of_a_rank_and_little_more() -> None:
    [(peak, share, largest)] = run_ranks(_peak_of_a_start, 1, parallel={})
    assert share > 5 * largest
    assert peak < share + 1.5 * largest + 20e6
