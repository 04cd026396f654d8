# SPDX-License-Identifier: Apache-2.0
"""Every host gets the exact sums of the numbers of a group, and no other group's."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_bagel.parallel.host_sums import sum_over_hosts
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
