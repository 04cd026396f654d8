# SPDX-License-Identifier: Apache-2.0
"""Exchanges of rows between ranks that gradients flow through, independent of any model.

Every rank of a group must call them in the same order, even a rank with nothing to send. The backward pass communicates as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        all_rows = rows.new_empty((group.size() * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_into_tensor(all_rows, rows.contiguous(), group=group)
        return all_rows

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        size = ctx.group.size()
        rows_gradient = gradient.new_empty((gradient.shape[0] // size, *gradient.shape[1:]))
        dist.reduce_scatter_tensor(rows_gradient, gradient.contiguous(), group=ctx.group)
        return rows_gradient, None


class _ExchangeParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(gradient, ctx.group), None


def _all_to_all(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    received = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, parts.contiguous(), group=group)
    return received


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather [n, ...] of every rank to [ranks * n, ...], in rank order. ``n`` must be equal on all ranks.

    The gradient of a rank's rows is the sum over ranks of the gradients of these rows (reduce-scatter).
    """
    return _GatherRows.apply(rows, group)


def exchange_parts(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Exchange parts [ranks, ...]: part i goes to rank i, and the result holds every rank's part for this one (all-to-all)."""
    return _ExchangeParts.apply(parts, group)
