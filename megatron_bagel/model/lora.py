# SPDX-License-Identifier: Apache-2.0
"""Linears with an adapter: W x + scale * B A x, with W frozen, for Megatron-Core's linears and for torch's.

The factors are cut as their linear is. A column linear cuts B by rows and has all of A; a row linear cuts A by columns and has all of B.
Both products are then partial where the linear's own result is, so no communication is added. The factor that every tensor-parallel
rank has whole gets a partial gradient on each, which ``training/optim/optimizer.py`` sums.

A fused linear (queries, keys and values; gate and up) has an adapter for each of its parts, as PEFT gives them to the parts of the
released model: A is stacked, [parts * r, in], and each row of B, [out, r], belongs to the part of its row in the weight.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_bagel.config.lora import OTHER_TARGETS, LoraSettings
from megatron_bagel.model.fused import linear, weight_gradient
from megatron_bagel.model.keyed_dropout import Draws
from megatron_bagel.model.linear import NoCommColumnLinear, NoCommRowLinear
from megatron_bagel.model.marks import mark

#: Mark of a factor whose gradient is the sum over the tensor-parallel ranks.
SUMMED_OVER_TP = "summed_over_tensor_parallel"


@dataclass(frozen=True)
class AdapterShape:
    """The adapter of a linear.

    Attributes:
        rank: Columns of B, and rows of A for each part.
        scale: The factor of the product.
        dropout: The share of inputs that are dropped where there are draws.
        parts: The rows of each fused part in one period of the full weight's rows, such as (query rows of a group, key rows, value
            rows); one number for a linear that is not fused.
        halves: Whether the parts are the two halves of a tensor-parallel rank's rows, as Megatron cuts a fused gate and up.
    """

    rank: int
    scale: float
    dropout: float = 0.0
    parts: tuple[int, ...] = (1,)
    halves: bool = False

    @property
    def num_parts(self) -> int:
        """Return the number of fused linears."""
        return 2 if self.halves else len(self.parts)

    def part_of_rows(self, rows: int, first_row: int) -> np.ndarray:
        """Return the part of ``rows`` rows of a rank, of which the first is row ``first_row`` of the full weight, int64 [rows]."""
        if self.halves:
            return np.arange(rows) // (rows // 2)
        ends = np.cumsum(self.parts)
        return np.searchsorted(ends, np.arange(first_row, first_row + rows) % ends[-1], side="right")


class Factor(nn.Module):
    """One of the two matrices of an adapter."""

    def __init__(self, rows: int, columns: int, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=like.dtype, device=like.device))


class Adapted(nn.Module):
    """What an adapter adds to a linear class; a subclass names this class first and the linear second."""

    row_of_part: torch.Tensor
    weight: torch.Tensor
    #: The dimension along which tensor parallelism cuts the weight; None for a linear that is whole on every rank.
    cut: int | None = None
    #: The words that key this linear's dropout; ``set_draw_keys`` sets them.
    draw_key = 0

    def __init__(self, *sizes: Any, adapter: AdapterShape, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.adapter = adapter
        self.rank_of_tp = parallel_state.get_tensor_model_parallel_rank() if self.cut is not None else 0
        rows, columns = self.weight.shape
        self.lora_A = Factor(adapter.num_parts * adapter.rank, columns, self.weight)
        self.lora_B = Factor(rows, adapter.rank, self.weight)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if adapter.num_parts > 1:
            parts = adapter.part_of_rows(rows, self.rank_of_tp * rows)
            self.register_buffer("row_of_part", torch.from_numpy(np.eye(adapter.num_parts, dtype=bool)[parts]), persistent=False)
        if self.cut is not None:
            whole, split = (self.lora_A, self.lora_B) if self.cut == 0 else (self.lora_B, self.lora_A)
            mark(whole.weight, **{SUMMED_OVER_TP: True})
            stride = getattr(self.weight, "partition_stride", 1)
            mark(split.weight, tensor_model_parallel=True, partition_dim=self.cut, partition_stride=stride)

    def forward(self, rows: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Map rows [..., in] to [..., out]. ``draws`` choose the inputs that the adapter drops; None drops nothing."""
        added = self.delta(rows.flatten(0, -2), draws)
        return super().forward(rows) + added.view(*rows.shape[:-1], added.shape[-1])

    def delta(self, rows: torch.Tensor, draws: Draws | None = None) -> torch.Tensor:
        """Return the adapter's part of the result, [s, out], for rows [s, in]."""
        mask = None
        if draws is not None and self.adapter.dropout:
            first_channel = self.rank_of_tp * rows.shape[1] if self.cut == 1 else 0
            mask = _Mask(draws, self.draw_key, first_channel, self.adapter.dropout)
        down = linear(rows, self.lora_A.weight) if mask is None else _DroppedLinear.apply(rows, self.lora_A.weight, mask)
        return linear(down * self.adapter.scale, self.up())

    def up(self) -> torch.Tensor:
        """Return B as a matrix over the stacked results of A, [out, parts * r]: zero where a row belongs to another part."""
        up: torch.Tensor = self.lora_B.weight
        if self.adapter.num_parts == 1:
            return up
        return (up[:, None, :] * self.row_of_part[:, :, None]).flatten(1)


class AdaptedShard(Adapted):
    """An adapted linear that tensor parallelism cuts."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shard the linear as it shards itself, and the cut factor in the same way."""
        own: Any = super()
        state: ShardedStateDict = own.sharded_state_dict(prefix, sharded_offsets, metadata)
        name = "lora_B.weight" if self.cut == 0 else "lora_A.weight"
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        tensors = {name: self.get_parameter(name)}
        return {**state, **make_sharded_tensors_for_checkpoint(tensors, prefix, {name: self.cut}, sharded_offsets, **groups)}


class AdaptedColumnLinear(AdaptedShard, NoCommColumnLinear):
    """Map [s, in] to [s, out / tp]."""

    cut = 0


class AdaptedRowLinear(AdaptedShard, NoCommRowLinear):
    """Map [s, in / tp] to a partial sum [s, out]."""

    cut = 1


class AdaptedLinear(Adapted, nn.Linear):
    """A linear that is whole on every rank: in the encoders, and between latents and hidden states."""


@dataclass(frozen=True)
class _Mask:
    """Which inputs of a linear are kept."""

    draws: Draws
    key: int
    first_channel: int
    share: float

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows with dropped inputs zero and the others scaled up."""
        kept = self.draws.kept(self.key, self.first_channel, rows.shape[1], self.share)
        return rows * kept.to(rows.dtype).div_(1 - self.share)


class _DroppedLinear(Function):
    """A linear of dropped inputs that keeps the inputs themselves, which the base saves anyway, and draws again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, mask: _Mask) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.mask = mask
        return mask(rows).mm(weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, _ = ctx.needs_input_grad
        return (
            ctx.mask(grad.mm(weight)) if needs_rows else None,
            weight_gradient(grad, ctx.mask(rows), weight) if needs_weight else None,
            None,
        )


def adapt_plain_linears(module: nn.Module, lora: LoraSettings) -> None:
    """Replace torch's linears in ``module`` that ``lora`` adapts, such as ``vae2llm`` or those of the vision tower. In place."""
    adapter = AdapterShape(lora.rank, lora.scale)
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear) and not isinstance(child, Adapted) and lora.adapts(name):
            settings: dict[str, Any] = {"bias": child.bias is not None, "dtype": child.weight.dtype, "device": child.weight.device}
            adapted = AdaptedLinear(child.in_features, child.out_features, adapter=adapter, **settings)
            adapted.weight, adapted.bias = child.weight, child.bias
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, adapted)


def set_draw_keys(layers: Sequence[nn.Module]) -> None:
    """Give every adapted linear of decoder layers the key of its dropout: a hash of its layer's number and its name."""
    for layer in layers:
        for name, linear_module in layer.named_modules():
            if isinstance(linear_module, Adapted):
                text = f"{getattr(layer, 'layer_number', 0)}/{name}"
                linear_module.draw_key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def has_layer_adapters(lora: LoraSettings) -> bool:
    """Return whether a decoder layer has an adapter."""
    return any(target not in OTHER_TARGETS for target in lora.targets)
