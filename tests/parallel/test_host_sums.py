# SPDX-License-Identifier: Apache-2.0
"""Every host gets the exact sums of the numbers of a group, and no other group's."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel import platform
from megatron_bagel.parallel import host_sums
from megatron_bagel.parallel.host_sums import create_host_group, sum_over_hosts
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed


def _numbers(rank: int) -> list[float]:
    return [2.0**52 + rank, float(rank), -0.25 * rank, float(rank == 1)]


def _sums() -> tuple[list[float], list[float]]:
    rank, data = dist.get_rank(), parallel_state.get_data_parallel_group()
    return sum_over_hosts(_numbers(rank), dist.group.WORLD), sum_over_hosts([float(rank)], data)


@pytest.mark.parametrize("ranks, parallel", [(1, {}), (4, {"tensor_model_parallel_size": 2})])
def test_sums_are_exact_and_of_the_group(ranks: int, parallel: dict[str, Any]) -> None:
    found = run_ranks(_sums, ranks, parallel=parallel)
    whole = [sum(column) for column in zip(*map(_numbers, range(ranks)), strict=True)]
    size = parallel.get("tensor_model_parallel_size", 1)
    for rank, (world, data) in enumerate(found):
        assert world == whole
        assert data == [float(sum(other for other in range(ranks) if other % size == rank % size))]


def _second_group() -> tuple[list[float], bool, bool]:
    world = dist.group.WORLD
    with mock.patch.object(platform, "has_gpu", lambda: True):
        create_host_group(7)
    with mock.patch.object(dist, "all_reduce", side_effect=dist.all_reduce) as reduced:
        sums = sum_over_hosts(_numbers(dist.get_rank()), world)
    group = reduced.call_args.kwargs["group"]
    return sums, group is not world and group.size() == world.size(), group in parallel_state._global_process_group_list


def test_the_world_of_gpus_has_a_second_group_with_megatron_s_time_outs() -> None:
    """Here over gloo, as if there were GPUs when it is made."""
    whole = [sum(column) for column in zip(*map(_numbers, range(2)), strict=True)]
    assert run_ranks(_second_group, 2, parallel={}) == [(whole, True, True)] * 2


def test_cpus_and_single_ranks_make_no_second_group() -> None:
    run_ranks(_no_second_group, 2, parallel={})
    run_ranks(_no_second_group, 1, True, parallel={})


def _no_second_group(has_gpu: bool = False) -> None:
    with mock.patch.object(platform, "has_gpu", lambda: has_gpu):
        create_host_group(7)
    assert host_sums._second_world is None
