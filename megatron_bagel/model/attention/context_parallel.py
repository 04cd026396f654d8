# SPDX-License-Identifier: Apache-2.0
"""Attention of a pack whose tokens lie on several ranks: two ways to exchange them around the plain backends.

``all_gather`` brings the keys and values of all ranks to every rank, which then answers its own queries. It works for any mask, any
number of heads and any choice of tokens per rank, and sends few bytes where query heads share keys. ``a2a`` (Ulysses) trades tokens
for heads: each rank gets all tokens of the pack for its share of the heads. It sends fewer bytes on many ranks, but the number of
ranks must divide the heads and the KV heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_bagel.layout.cp_partition import concatenated
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.model.pack_context import AttentionPlan
from megatron_bagel.parallel.collectives import exchange_parts, gather_rows
from megatron_bagel.platform.device import to_device

Backend = Callable[..., AttentionPlan]


@dataclass(frozen=True)
class CPContext:
    """A rank among those that share a pack. ``orders`` holds every rank's order (``layout/cp_partition.py``), by rank in ``group``."""

    rank: int
    group: dist.ProcessGroup
    orders: Sequence[TokenOrder]
    comm_type: str = "all_gather"

    @property
    def size(self) -> int:
        """Return the number of ranks that share the pack."""
        return len(self.orders)


class _Rows:
    """The rows of all ranks, each rank's padded to the same number, and the index of the real rows among them."""

    def __init__(self, orders: Sequence[TokenOrder], device: torch.device | str) -> None:
        counts = [len(order.positions) for order in orders]
        self.ranks, self.padded_rows = len(counts), max(counts)
        real_rows = np.concatenate([rank * self.padded_rows + np.arange(count) for rank, count in enumerate(counts)])
        # Equal counts need no padding, and ``pick`` then takes every row.
        self.real_rows = None if len(real_rows) == self.ranks * self.padded_rows else to_device(torch.from_numpy(real_rows), device)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Pad one rank's rows [n, heads, d] to [padded_rows, heads, d]."""
        return F.pad(x, (0, 0, 0, 0, 0, self.padded_rows - x.shape[0])) if x.shape[0] < self.padded_rows else x

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """Return the real rows of [ranks * padded_rows, ...]."""
        return x if self.real_rows is None else x.index_select(0, self.real_rows)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Invert ``pick`` and fill the padding with zeros."""
        if self.real_rows is None:
            return x
        return x.new_zeros((self.ranks * self.padded_rows, *x.shape[1:])).index_copy(0, self.real_rows, x)


class AllGatherPlan:
    """A rank's queries against the keys of all ranks. ``backend`` is the plan class that computes the attention of a rank."""

    def __init__(self, backend: Backend, mask: PackMask, cp_context: CPContext, device: torch.device | str = "cpu") -> None:
        self.group, self.rows = cp_context.group, _Rows(cp_context.orders, device)
        self.inner = backend(mask, cp_context.orders[cp_context.rank], device, keys=concatenated(cp_context.orders))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """Compute attention as ``AttentionPlan.attend`` describes, with one all-gather forward and one reduce-scatter backward."""
        keys_values = self.rows.pick(gather_rows(self.rows.pad(torch.cat([k, v], 1)), self.group))
        keys, values = keys_values.chunk(2, 1)
        return self.inner.attend(q, keys, values, layer_number)


class AllToAllPlan:
    """All tokens of the pack, but only a share of the heads. ``attend`` raises ValueError when the ranks do not divide the heads."""

    def __init__(self, backend: Backend, mask: PackMask, cp_context: CPContext, device: torch.device | str = "cpu") -> None:
        self.group, self.rows = cp_context.group, _Rows(cp_context.orders, device)
        self.inner = backend(mask, concatenated(cp_context.orders), device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """Compute attention as ``AttentionPlan.attend`` describes, with two all-to-alls forward and two backward."""
        ranks, tokens = self.rows.ranks, q.shape[0]
        if q.shape[1] % ranks or k.shape[1] % ranks:
            raise ValueError(
                f"--cp-comm-type a2a cannot share {q.shape[1]} heads and {k.shape[1]} KV heads between --context-parallel-size {ranks} "
                "ranks; use all_gather"
            )
        heads = [q.shape[1] // ranks, k.shape[1] // ranks, v.shape[1] // ranks]
        parts = torch.cat([x.unflatten(1, (ranks, -1)) for x in (q, k, v)], 2)
        parts = self.rows.pad(parts.flatten(1, 2)).unflatten(1, (ranks, -1))
        received = self.rows.pick(exchange_parts(parts.transpose(0, 1), self.group).flatten(0, 1))
        query, key, value = received.split(heads, 1)
        attended = self.inner.attend(query, key, value, layer_number)
        returned = exchange_parts(self.rows.spread(attended).unflatten(0, (ranks, self.rows.padded_rows)), self.group)
        return returned.transpose(0, 1).flatten(1)[:tokens]


def context_plan(backend: Backend, mask: PackMask, cp_context: CPContext, device: torch.device | str = "cpu") -> AttentionPlan:
    """Return the plan for ``cp_context.comm_type``, all_gather or a2a. Raises ValueError for any other name."""
    if cp_context.comm_type == "all_gather":
        return AllGatherPlan(backend, mask, cp_context, device)
    if cp_context.comm_type == "a2a":
        return AllToAllPlan(backend, mask, cp_context, device)
    raise ValueError(f"--cp-comm-type {cp_context.comm_type!r} is unknown; use all_gather or a2a")
