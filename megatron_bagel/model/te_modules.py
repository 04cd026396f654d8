# SPDX-License-Identifier: Apache-2.0
"""Transformer Engine's linears and norm in the shape our specs expect. They need a GPU, so only ``--transformer-impl`` imports them.

The linears run with ``parallel_mode=None``: like the local ones they leave communication to the layer, which gathers and reduces
once for both experts. Where both experts have a linear, one grouped product computes both. The weights stay in the experts' own
linears, so names and checkpoints are those of the local spec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformer_engine.pytorch as te
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_bagel.model.experts import NO_DRAWS, ExpertDraws, LinearPair
from megatron_bagel.model.lora import AdaptedShard
from megatron_bagel.model.marks import mark

Product = Callable[[torch.Tensor], torch.Tensor]
#: FP8 products take rows in multiples of this number: 32 for MXFP8, 16 for the other recipes.
FP8_ROWS = 32


def _mark_sharded(weight: torch.Tensor, dim: int, stride: int) -> None:
    """Set Megatron's marks on a weight that tensor parallelism shards.

    Megatron's own function refuses weights that already have marks, and Transformer Engine marks its weights as unsharded.
    """
    mark(weight, tensor_model_parallel=True, partition_dim=dim, partition_stride=stride)


def padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """Return rows with rows of zeros behind them, up to a multiple; at least one multiple, because FP8 products refuse no rows."""
    missing = -len(rows) % multiple if len(rows) else multiple
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing and multiple > 1 else rows


class TELinear(te.Linear):
    """A linear sharded along ``partition_dim`` over the tensor-parallel ranks. It does not communicate."""

    partition_dim = 0

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[torch.Tensor], Any],
        bias: bool,
        stride: int = 1,
        **_: Any,
    ) -> None:
        sizes = [output_size, input_size]
        sizes[self.partition_dim] //= config.tensor_model_parallel_size
        super().__init__(
            sizes[1], sizes[0], bias=bias, init_method=init_method, params_dtype=config.params_dtype, parallel_mode=None,
        )  # fmt: skip
        self.row_multiple = FP8_ROWS if config.fp8 else 1
        _mark_sharded(self.weight, self.partition_dim, stride)
        if bias:
            _mark_sharded(self.bias, 0, stride)

    def forward(self, x: torch.Tensor, product: Product | None = None) -> torch.Tensor:
        """Return the product with the weight, or ``product(x)``, after this module's hooks have run."""
        if product is not None:
            return product(x)
        result = super().forward(padded(x, self.row_multiple))
        return result if len(result) == len(x) else result[: len(x)]

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shard the state with the keys of the local linears, so checkpoints do not depend on the implementation."""
        state = {name: value for name, value in self.state_dict(prefix="", keep_vars=True).items() if "_extra_state" not in name}
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": self.partition_dim, "bias": 0},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )


class TEColumn(TELinear):
    """Map [s, in] to [s, out / tp]."""


class TERow(TELinear):
    """Map [s, in / tp] to [s, out], a partial sum."""

    partition_dim = 1


class AdaptedTEColumn(AdaptedShard, TEColumn):  # type: ignore[misc]  # it takes draws and never a grouped product
    """Map [s, in] to [s, out / tp], with an adapter."""

    cut = 0


class AdaptedTERow(AdaptedShard, TERow):  # type: ignore[misc]
    """Map [s, in / tp] to [s, out], a partial sum, with an adapter."""

    cut = 1


class TENorm(te.RMSNorm):
    """Transformer Engine's RMSNorm with the mark Megatron needs for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, sequence_parallel: bool | None = None) -> None:
        super().__init__(hidden_size, eps=eps, params_dtype=config.params_dtype)
        mark(self.weight, sequence_parallel=config.sequence_parallel if sequence_parallel is None else sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise like ``RMSNorm``. The kernel refuses zero rows; the product then keeps the weight in the graph."""
        return super().forward(x) if len(x) else x * self.weight


class TELinearPair(LinearPair):
    """The linears of two experts as one grouped linear, which borrows their weights."""

    und: TELinear
    gen: TELinear

    def __init__(self, und: TELinear, gen: TELinear) -> None:
        super().__init__(und, gen)
        self.grouped: torch.nn.Module | None = None
        if und is not gen:
            outputs, inputs = und.weight.shape
            # Built on "meta", because otherwise it would allocate weights that the first call replaces.
            self.grouped = te.GroupedLinear(
                2, inputs, outputs, bias=isinstance(und.bias, torch.nn.Parameter), params_dtype=und.weight.dtype,
                parallel_mode=None, device="meta",
            )  # fmt: skip

    def __call__(self, und: torch.Tensor, gen: torch.Tensor, draws: ExpertDraws = NO_DRAWS) -> Sequence[torch.Tensor]:
        # A grouped linear computes gradients for all of its weights or for none. That rules it out if one expert is frozen.
        grouped = self.grouped
        if grouped is None or self.und.weight.requires_grad != self.gen.weight.requires_grad:
            return super().__call__(und, gen, draws)
        for number, linear in enumerate((self.und, self.gen)):
            for name, parameter in linear.named_parameters(recurse=False):
                if getattr(grouped, f"{name}{number}") is not parameter:
                    setattr(grouped, f"{name}{number}", parameter)
        lengths = [len(und), len(gen)]
        und, gen = (padded(part, self.und.row_multiple) for part in (und, gen))
        rows = [len(und), len(gen)]

        def with_gen(und: torch.Tensor) -> torch.Tensor:
            return self.gen(gen, lambda gen: grouped(torch.cat([und, gen]), rows))

        # The call goes through both modules because Megatron's overlap waits for gathered weights in the hooks of their owners.
        parts = self.und(und, with_gen).split(rows)
        # A slice of everything would still cost a copy in the backward pass.
        return parts if rows == lengths else [part[:length] for part, length in zip(parts, lengths, strict=True)]
