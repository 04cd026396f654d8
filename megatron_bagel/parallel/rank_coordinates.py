# SPDX-License-Identifier: Apache-2.0
"""Where a rank is on every parallel axis, by Megatron's numbering: any rank can compute it for all ranks without communication."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's index on each axis. Tensor-parallel ranks are neighbours, then context, data and pipeline ("tp-cp-ep-dp-pp")."""

    tensor: int
    context: int
    data: int
    pipeline: int


def coordinates_of(rank: int) -> RankCoordinates:
    """Return the coordinates of any rank of the world. Megatron-Core's process groups must exist."""
    rest, tensor = divmod(rank, parallel_state.get_tensor_model_parallel_world_size())
    rest, context = divmod(rest, parallel_state.get_context_parallel_world_size())
    pipeline, data = divmod(rest, parallel_state.get_data_parallel_world_size())
    return RankCoordinates(tensor, context, data, pipeline)


def check_rank_order() -> None:
    """Check that Megatron-Core numbers this rank as ``coordinates_of`` does. Raises RuntimeError if it does not."""
    megatron = RankCoordinates(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    if megatron != coordinates_of(dist.get_rank()):
        raise RuntimeError(f"Megatron-Core places rank {dist.get_rank()} at {megatron}; expected {coordinates_of(dist.get_rank())}")


def rank_list(ranks: list[int]) -> str:
    """Format ranks as "rank 3" or "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    run_texts = ", ".join(f"{first_rank}-{last_rank}" if last_rank > first_rank else f"{first_rank}" for first_rank, last_rank in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {run_texts}"
