# SPDX-License-Identifier: Apache-2.0
"""The weights that exist once per expert, and the tensor-parallel exchange around them.

``und`` serves text and ViT tokens, ``gen`` serves VAE tokens. Where a layer kind shares a part, only ``und`` exists and
serves both slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.model.fused import swiglu
from megatron_bagel.model.kernels.choice import UsesKernels
from megatron_bagel.model.keyed_dropout import Draws
from megatron_bagel.model.lora import Adapted
from megatron_bagel.model.pack_context import PackContext

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)


class WeightedModule(Protocol):
    """A linear or a norm: it maps rows to rows with one weight."""

    @property
    def weight(self) -> torch.Tensor:
        """Return the weight, [out, in] of a linear and [h] of a norm."""

    def __call__(self, rows: torch.Tensor, /) -> torch.Tensor:
        """Map rows [s, in] to [s, out]."""


class ExpertPair(MegatronModule, Generic[ModuleT]):
    """One part of a layer, built once (``und``) or twice (``und`` and ``gen``)."""

    und: ModuleT
    gen: ModuleT

    def __init__(
        self, config: TransformerConfig, build: Callable[[], ModuleT], two_experts: bool, build_gen: Callable[[], ModuleT] | None = None
    ) -> None:
        """Build the part; ``build_gen`` builds the generation expert's where it differs."""
        super().__init__(config=config)
        self.und = build()
        if two_experts:
            self.gen = (build_gen or build)()

    @property
    def two_experts(self) -> bool:
        """Return whether each expert has separate weights."""
        return hasattr(self, "gen")

    @property
    def modules_of_both(self) -> tuple[ModuleT, ModuleT]:
        """Return the understanding expert's module and the generation expert's, which may be the same module."""
        return self.und, self.gen if self.two_experts else self.und


#: The draws of the understanding expert's rows and of the generation expert's; None where nothing is dropped.
ExpertDraws = tuple[Draws | None, Draws | None]
NO_DRAWS: ExpertDraws = (None, None)


class LinearPair:
    """The same linear of both experts (or one that serves both), each applied to its expert's rows.

    A spec may replace this class. It is not a module, so the linears keep their names in the module tree.
    """

    def __init__(self, und: WeightedModule, gen: WeightedModule) -> None:
        self.und, self.gen = und, gen

    def __call__(self, und: torch.Tensor, gen: torch.Tensor, draws: ExpertDraws = NO_DRAWS) -> Sequence[torch.Tensor]:
        """Map [n_und, in] and [n_gen, in] to [n_und, out] and [n_gen, out]. ``draws`` are for the dropout of adapters."""
        return tuple(
            rows.new_empty((0, module.weight.shape[0])) if idle(module, rows) else applied(module, rows, tokens)
            for module, rows, tokens in zip((self.und, self.gen), (und, gen), draws, strict=True)
        )


def applied(module: WeightedModule, rows: torch.Tensor, draws: Draws | None) -> torch.Tensor:
    """Apply a linear; only one with an adapter takes ``draws``."""
    return module(rows, draws) if isinstance(module, Adapted) else module(rows)


def idle(module: WeightedModule, rows: torch.Tensor) -> bool:
    """Return whether an expert can be skipped: it has no rows, and nothing waits for the (zero) gradients of its weights.

    Text generation uses one expert, a token at a time. There the time goes into kernel launches, not into arithmetic.
    """
    return not len(rows) and not module.weight.requires_grad and not torch.is_grad_enabled()


def per_expert(pair: ExpertPair[Any], und: torch.Tensor, gen: torch.Tensor) -> list[torch.Tensor]:
    """Apply each expert's norm to its rows; an expert without rows gives an empty result of the right width."""
    return [rows if idle(module, rows) else module(rows) for module, rows in zip(pair.modules_of_both, (und, gen), strict=True)]


class ExpertExchange:
    """The tensor-parallel communication of half a layer, done once for both experts."""

    def __init__(self, config: TransformerConfig) -> None:
        self.sequence_parallel = config.sequence_parallel
        self.world = config.tensor_model_parallel_size

    def first_slot(self, local_rows: int) -> int:
        """Return the slot of this rank's first row."""
        return parallel_state.get_tensor_model_parallel_rank() * local_rows if self.sequence_parallel else 0

    def enter(self, parts: Sequence[torch.Tensor], local_rows: int, context: PackContext) -> Sequence[torch.Tensor]:
        """Return the rows of both experts, complete on every tensor-parallel rank."""
        if self.world == 1:
            return parts
        hidden = join(parts, local_rows)
        if self.sequence_parallel:
            return context.rows_by_expert(gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True))
        return context.rows_by_expert(copy_to_tensor_model_parallel_region(hidden))

    def leave(self, parts: Sequence[torch.Tensor], context: PackContext) -> torch.Tensor:
        """Return the sum of the ranks' partial results, [local rows, h]."""
        hidden = join(parts, context.length)
        if self.world == 1:
            return hidden
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden)
        return reduce_from_tensor_model_parallel_region(hidden)


def join(parts: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Concatenate both experts' rows and zeros for padding, [rows, ...]."""
    padding_rows = rows - sum(part.shape[0] for part in parts)
    # An expert without rows is joined as well, which keeps its weights in the graph.
    padding = [parts[0].new_zeros((padding_rows, *parts[0].shape[1:]))] if padding_rows else []
    return torch.cat([*parts, *padding])


@dataclass
class MLPSubmodules:
    """Linears of one expert's MLP, and the class that applies those of both experts. ``gen`` has those of the other, if they differ."""

    linear_fc1: ModuleSpec | type
    linear_fc2: ModuleSpec | type
    linear_pair: type[LinearPair] = LinearPair
    gen: MLPSubmodules | None = None


class SwiGLU(MegatronModule, UsesKernels):
    """Weights of one expert's MLP; ``MLPExperts`` applies both."""

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules) -> None:
        super().__init__(config=config)
        self.linear_fc1 = build_module(
            submodules.linear_fc1, config.hidden_size, 2 * config.ffn_hidden_size, config=config,
            init_method=config.init_method, bias=False, gather_output=False, skip_bias_add=False, stride=2,
        )  # fmt: skip
        self.linear_fc2 = build_module(
            submodules.linear_fc2, config.ffn_hidden_size, config.hidden_size, config=config,
            init_method=config.output_layer_init_method, bias=False, input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """Shard gate and up separately, as Megatron-Core's MLP does."""
        state = self.linear_fc1.sharded_state_dict(f"{prefix}linear_fc1.", sharded_offsets, metadata)
        for key in (f"{prefix}linear_fc1.weight", f"{prefix}linear_fc1.lora_B.weight"):
            if key in state:
                state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return {**state, **self.linear_fc2.sharded_state_dict(f"{prefix}linear_fc2.", sharded_offsets, metadata)}


class MLPExperts(ExpertPair[SwiGLU]):
    """The MLPs of both experts: fc2(silu(gate) * up), [s, h] to [s, h], partial sums under tensor parallelism.

    Megatron-Core's MLP reduces its output at once; here both experts are reduced together.
    """

    def __init__(self, config: TransformerConfig, submodules: MLPSubmodules, two_experts: bool) -> None:
        super().__init__(config, lambda: SwiGLU(config, submodules), two_experts, lambda: SwiGLU(config, submodules.gen or submodules))
        und, gen = self.modules_of_both
        self.fc1 = submodules.linear_pair(und.linear_fc1, gen.linear_fc1)
        self.fc2 = submodules.linear_pair(und.linear_fc2, gen.linear_fc2)

    def forward(self, und: torch.Tensor, gen: torch.Tensor, draws: ExpertDraws = NO_DRAWS) -> tuple[torch.Tensor, ...]:
        """Apply the MLPs to the rows of each expert, which are complete on every tensor-parallel rank."""
        und, gen = (swiglu(rows, self.und.kernels) for rows in self.fc1(und, gen, draws))
        return tuple(self.fc2(und, gen, draws))
