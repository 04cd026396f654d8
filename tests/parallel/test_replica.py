# SPDX-License-Identifier: Apache-2.0
"""A replica's ranks know their places; rows reach exactly their readers, and come back summed."""

from __future__ import annotations

import pytest
import torch

from megatron_bagel.parallel.replica import make_replica, return_rows, send_rows
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed


def _places() -> tuple:
    replica = make_replica()
    counts = [0, 3, 1, 2][: replica.size]
    rows = torch.full((counts[replica.rank], 2), float(replica.rank))
    received = send_rows(rows, counts, replica.boundary_ranks, replica.group)
    back = return_rows(received * (replica.rank + 1), counts, replica.boundary_ranks, replica.group)
    return replica.rank, replica.first_stage_ranks, replica.last_stage_ranks, replica.first_stage_leads, received, back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_go_to_readers_and_back(dtype: torch.dtype) -> None:
    results = run_ranks(_rows, 3, dtype)
    for rank, (received, back) in enumerate(results):
        sent = torch.tensor([0, 0, 2]).to(dtype)[:, None].expand(3, 2)
        assert torch.equal(received, sent if rank in (0, 2) else sent[:0])
        # Readers 0 and 2 multiply by 1 and 3.
        assert torch.equal(back, torch.full((len(back), 2), rank * 4.0, dtype=dtype)) and len(back) == [2, 0, 1][rank]


def _rows(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    group, counts, readers = torch.distributed.group.WORLD, [2, 0, 1], (0, 2)
    rank = group.rank()
    received = send_rows(torch.full((counts[rank], 2), float(rank), dtype=dtype), counts, readers, group)
    return received, return_rows(received * (rank + 1), counts, readers, group)


def test_places_in_two_replicas() -> None:
    """Tensor-parallel ranks are neighbours, data-parallel ones next, stages last."""
    results = run_ranks(_places, 8, parallel={"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2})
    for world_rank, (rank, first, last, leads, received, back) in enumerate(results):
        assert (first, last, leads) == ((0, 1), (2, 3), (0,))
        assert rank == world_rank % 2 + 2 * (world_rank // 4)
        assert received[:, 0].tolist() == [1, 1, 1, 2, 3, 3]
        assert back.tolist() == [[rank * 10.0] * 2] * len(back)
