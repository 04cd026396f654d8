"""Where a rank stands on every axis, by Megatron's numbering: known of all ranks without asking them, however many there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class RankCoordinates:
    """A rank's numbers on the axes; tensor-parallel ranks are neighbours, then context, data and pipeline ("tp-cp-ep-dp-pp")."""

    tensor: int
    context: int
    data: int
    pipeline: int


def coordinates_of(rank: int) -> RankCoordinates:
    """RankCoordinates of any rank of the world. Megatron-Core's groups must exist."""
    numbers = []
    for size in (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
    ):
        numbers.append(rank % size)
        rank //= size
    return RankCoordinates(*numbers, rank)


def check_rank_order() -> None:
    """Raises RuntimeError where Megatron-Core numbers this rank in another order than `coordinates_of`."""
    megatron = RankCoordinates(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    if megatron != coordinates_of(dist.get_rank()):
        raise RuntimeError(f"Megatron-Core places rank {dist.get_rank()} at {megatron}; expected {coordinates_of(dist.get_rank())}")


def rank_list(ranks: list[int]) -> str:
    """ "rank 3", "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    listed = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"
