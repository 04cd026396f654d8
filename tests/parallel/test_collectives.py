# SPDX-License-Identifier: Apache-2.0
"""Exchanged rows arrive where they should, and gradients return to the rank that sent the rows, summed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_bagel.parallel.collectives import exchange_parts, gather_rows
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed
DTYPES = (torch.float32, torch.bfloat16)


def _values(rank: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    # Small whole numbers: sums are exact in every dtype.
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def _gather(rows: int, dtype: torch.dtype) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    own = _values(rank, rows, 2, 3, dtype=dtype).requires_grad_()
    gathered = gather_rows(own, dist.group.WORLD)
    assert torch.equal(gathered, torch.cat([_values(other, rows, 2, 3, dtype=dtype) for other in range(size)]))
    weights = [_values(100 + other, size * rows, 2, 3, dtype=dtype) for other in range(size)]
    (gathered * weights[rank]).sum().backward()
    assert torch.equal(own.grad, sum(weights)[rank * rows : (rank + 1) * rows])


def _exchange(rows: int, dtype: torch.dtype) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = [_values(other, size, rows, 3, dtype=dtype) for other in range(size)]
    # Not contiguous, as attention hands it over.
    own = sent[rank].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    received = exchange_parts(own, dist.group.WORLD)
    assert torch.equal(received, torch.stack([parts[rank] for parts in sent]))
    weights = [_values(100 + other, size, rows, 3, dtype=dtype) for other in range(size)]
    (received * weights[rank]).sum().backward()
    assert torch.equal(own.grad, torch.stack([weights[other][rank] for other in range(size)]))


def _all() -> None:
    for dtype in DTYPES:
        for rows in (5, 0):
            _gather(rows, dtype)
            _exchange(rows, dtype)


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_and_gradients(ranks: int) -> None:
    run_ranks(_all, ranks)
