# SPDX-License-Identifier: Apache-2.0
"""One rank alone moves nothing in the step; two ranks still reduce and gather."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.profiler import ProfilerActivity, profile

from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, finalize_gradients, optimizer_step, wrap_ddp
from tests.distributed import run_ranks

MOVES = ("reduce_scatter", "all_gather", "allgather")


def _one_step(overlap: bool) -> tuple[torch.Tensor, list[str]]:
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 8)
    settings = OptimizerSettings(lr=0.1, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    modules: list[DistributedDataParallel] = wrap_ddp(config, [layer], settings)
    optimizer = build_optimizer(modules, settings)
    for module in modules:
        module.zero_grad_buffer()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        modules[0](torch.full((4, 8), 1.0 + dist.get_rank())).square().sum().backward()
        finalize_gradients(modules)
        optimizer_step(optimizer)
        modules[0](torch.zeros(1, 8))  # with overlap_param_gather the weights arrive here
    moved = [event.key for event in seen.key_averages() if any(move in event.key for move in MOVES)]
    return layer.weight.detach().clone(), moved


@pytest.mark.parametrize("overlap", [False, True])
def test_a_lone_rank_moves_no_buffer(overlap: bool, single_rank) -> None:
    torch.manual_seed(0)
    before = torch.nn.Linear(8, 8).weight.detach()
    weight, moved = _one_step(overlap)
    # The first step of Adam moves every weight by the learning rate.
    torch.testing.assert_close((weight - before).abs(), torch.full((8, 8), 0.1))
    assert moved == []


def _one_step_of_a_rank() -> tuple[torch.Tensor, list[str]]:
    parallel_state.initialize_model_parallel()
    return _one_step(False)


@pytest.mark.distributed
def test_two_ranks_move_theirs_and_agree() -> None:
    (first, moved), (second, _) = run_ranks(_one_step_of_a_rank, 2)
    assert torch.equal(first, second) and moved
