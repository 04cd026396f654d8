# SPDX-License-Identifier: Apache-2.0
"""One decoder layer of a Mixture-of-Transformers: two slices of tokens, two sets of weights, one attention.

All three layer kinds are this class; the kind decides which parts exist twice. No layer gathers or scatters tokens, because a
rank's tokens are sorted by expert before the first layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset

from megatron_bagel.model.experts import ExpertExchange, ExpertPair, MLPExperts, MLPSubmodules, per_expert
from megatron_bagel.model.fused import add_and_norm
from megatron_bagel.model.kernels.choice import UsesKernels
from megatron_bagel.model.kernels.eager import EAGER
from megatron_bagel.model.norm import RMSNorm
from megatron_bagel.model.pack_context import PackContext
from megatron_bagel.model.recompute import recomputed, recomputes
from megatron_bagel.model.self_attention import AttentionSubmodules, SelfAttention
from megatron_bagel.model.sparse_experts import SparseExperts


@dataclass
class MoTLayerSubmodules:
    """Parts of a layer. ``two_attentions`` and ``two_mlps`` tell whether each expert has its attention and its MLP.

    ``sparse_kinds`` returns the expert kinds ("und", "gen") whose MLPs are sparse in a layer, which is counted from 0.
    """

    norm: ModuleSpec | type
    attention: AttentionSubmodules
    mlp: MLPSubmodules
    two_attentions: bool
    two_mlps: bool
    freeze_und: bool = False
    sparse_kinds: Callable[[int], Collection[str]] = lambda layer: ()


class MoTLayer(MegatronModule, BaseTransformerLayer, UsesKernels):
    """norm -> attention -> add -> norm -> MLP -> add, with the weights of each token's expert."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoTLayerSubmodules,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        pp_rank = pg_collection.pp.rank() if pg_collection is not None else None
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pp_rank)
        self.freeze_und = submodules.freeze_und

        def norm() -> torch.nn.Module:
            return build_module(submodules.norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        self.input_layernorm = ExpertPair(config, norm, submodules.two_attentions)
        self.self_attention = SelfAttention(
            config, submodules.attention, self.layer_number, submodules.two_attentions, submodules.freeze_und
        )
        self.pre_mlp_layernorm = ExpertPair(config, norm, submodules.two_attentions)
        sparse_kinds = submodules.sparse_kinds(self.layer_number - 1)
        self.mlp = (
            SparseExperts(config, submodules.mlp, submodules.two_mlps, self.layer_number, sparse_kinds)
            if sparse_kinds
            else MLPExperts(config, submodules.mlp, submodules.two_mlps)
        )
        self.__dict__["exchange"] = ExpertExchange(config)
        self.recompute_mlp = recomputes(config, "mlp")

    def forward(self, hidden_states: torch.Tensor, packed_seq_params: PackContext, **_: Any) -> tuple[torch.Tensor, None]:
        """Run the layer on ``hidden_states`` [s (or s / tp under sequence parallelism), 1, h]; the result has the same shape.

        ``packed_seq_params`` is the context of the pack. TransformerBlock also passes masks and rotary tensors, which are ignored
        because the context holds them.
        """
        context, hidden = packed_seq_params, hidden_states.squeeze(1)
        rows = hidden.shape[0]
        first_slot = self.exchange.first_slot(rows)
        normed: Sequence[torch.Tensor] = per_expert(self.input_layernorm, *context.rows_by_expert(hidden, first_slot))
        if self._adds_in_norm:
            hidden, normed = self._add_and_norm(hidden, self.self_attention(normed, rows, context), first_slot, context)
        else:
            hidden = hidden + self.self_attention(normed, rows, context)
            normed = per_expert(self.pre_mlp_layernorm, *context.rows_by_expert(hidden, first_slot))
        hidden = hidden + self._mlp_results(normed, rows, context)
        return hidden.unsqueeze(1), None

    @property
    def _adds_in_norm(self) -> bool:
        """Return whether one kernel adds and normalises. Transformer Engine's norm has a kernel of its own."""
        return self.kernels is not EAGER and isinstance(self.pre_mlp_layernorm.und, RMSNorm)

    def _add_and_norm(
        self, hidden: torch.Tensor, added: torch.Tensor, first_slot: int, context: PackContext
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """Return ``hidden`` + ``added`` [rows, h], and the inputs of both experts' MLPs."""
        und, gen = self.pre_mlp_layernorm.modules_of_both
        n_und = context.und_rows(len(hidden), first_slot)
        # With a frozen understanding expert its rows get a gradient of zeros from behind, and so does its weight if it has one at all.
        hidden, normed = add_and_norm(hidden, added, und(None), gen(None), n_und, self.config.layernorm_epsilon, self.kernels)
        return hidden, context.rows_by_expert(normed, first_slot)

    def _mlp_results(self, normed: Sequence[torch.Tensor], rows: int, context: PackContext) -> torch.Tensor:
        """Return the results of the MLPs for this rank's rows, [rows, h]."""
        if isinstance(self.mlp, SparseExperts):
            settings = {"rows": rows, "context": context, "exchange": self.exchange, "freeze_und": self.freeze_und}
            mlp: Callable[..., torch.Tensor] = partial(self.mlp.__call__, **settings)
            return recomputed(mlp, *normed) if self.recompute_mlp else mlp(*normed)
        expert_rows = self.exchange.enter(normed, rows, context)

        def dense_mlp(und: torch.Tensor, gen: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.mlp(und, gen, context.draws)

        und, gen = recomputed(dense_mlp, *expert_rows) if self.recompute_mlp else dense_mlp(*expert_rows)
        return self.exchange.leave([und.detach() if self.freeze_und else und, gen], context)
