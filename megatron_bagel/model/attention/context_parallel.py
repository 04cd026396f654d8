"""Attention of a pack whose tokens lie on several ranks: what is exchanged around the plain backends, in two ways.

``all_gather`` brings keys and values of all ranks to every rank, which then answers its own queries: any mask, any head count, any
choice of tokens per rank, and few bytes where query heads share keys. ``a2a`` (Ulysses) trades tokens for heads: each rank gets the
whole pack for its share of the heads, which moves fewer bytes on many ranks but needs heads and KV heads to divide.
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

Backend = Callable[..., AttentionPlan]


@dataclass(frozen=True)
class CPContext:
    """A rank's place among those that share a pack: ``orders`` of all of them (layout/cp_partition.py), by rank in ``group``."""

    rank: int
    group: dist.ProcessGroup
    orders: Sequence[TokenOrder]
    comm_type: str = "all_gather"

    @property
    def size(self) -> int:
        """Ranks that share the pack."""
        return len(self.orders)


class _Rows:
    """Rows of all ranks, each rank's padded to the same number, and where the real ones are among them."""

    def __init__(self, orders: Sequence[TokenOrder], device: torch.device | str) -> None:
        counts = [len(order.positions) for order in orders]
        self.ranks, self.each = len(counts), max(counts)
        real = np.concatenate([rank * self.each + np.arange(count) for rank, count in enumerate(counts)])
        # Equal counts need no padding, and then nothing has to be picked.
        self.real = None if len(real) == self.ranks * self.each else torch.from_numpy(real).to(device)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """A rank's own rows [n, heads, d] -> [each, heads, d]."""
        return F.pad(x, (0, 0, 0, 0, 0, self.each - x.shape[0])) if x.shape[0] < self.each else x

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """[ranks * each, ...] -> the real rows."""
        return x if self.real is None else x.index_select(0, self.real)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of ``pick``, zeros between."""
        if self.real is None:
            return x
        return x.new_zeros((self.ranks * self.each, *x.shape[1:])).index_copy(0, self.real, x)


class AllGatherPlan:
    """Own queries against the keys of all ranks. ``backend`` is the plan class for what a rank computes."""

    def __init__(self, backend: Backend, mask: PackMask, place: CPContext, device: torch.device | str = "cpu") -> None:
        self.group, self.rows = place.group, _Rows(place.orders, device)
        self.inner = backend(mask, place.orders[place.rank], device, keys=concatenated(place.orders))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """See AttentionPlan. One all-gather forward, one reduce-scatter backward."""
        gathered = self.rows.pick(gather_rows(self.rows.pad(torch.cat([k, v], 1)), self.group))
        keys, values = gathered.chunk(2, 1)
        return self.inner.attend(q, keys, values, layer_number)


class AllToAllPlan:
    """All tokens of the pack, a share of the heads. Raises ValueError for heads that do not divide."""

    def __init__(self, backend: Backend, mask: PackMask, place: CPContext, device: torch.device | str = "cpu") -> None:
        self.group, self.rows = place.group, _Rows(place.orders, device)
        self.inner = backend(mask, concatenated(place.orders), device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """See AttentionPlan. Two all-to-alls forward, two backward."""
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
        mixed = self.inner.attend(*received.split(heads, 1), layer_number)
        returned = exchange_parts(self.rows.spread(mixed).unflatten(0, (ranks, self.rows.each)), self.group)
        return returned.transpose(0, 1).flatten(1)[:tokens]


def context_plan(backend: Backend, mask: PackMask, place: CPContext, device: torch.device | str = "cpu") -> AttentionPlan:
    """Plan for ``place.comm_type``, all_gather or a2a; ValueError for others."""
    if place.comm_type == "all_gather":
        return AllGatherPlan(backend, mask, place, device)
    if place.comm_type == "a2a":
        return AllToAllPlan(backend, mask, place, device)
    raise ValueError(f"--cp-comm-type {place.comm_type!r} is unknown; use all_gather or a2a")
