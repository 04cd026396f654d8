# SPDX-License-Identifier: Apache-2.0
"""The projections around attention, one set per expert. Tokens of different experts meet only inside the shared core attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.model.experts import ExpertExchange, ExpertPair, LinearPair
from megatron_bagel.model.fused import norm_and_rotate, rotate
from megatron_bagel.model.kernels.choice import UsesKernels
from megatron_bagel.model.pack_context import PackContext
from megatron_bagel.model.recompute import recomputed, recomputes
from megatron_bagel.parallel.kv_sharing import gather_columns, kv_sharing_group


@dataclass
class AttentionSubmodules:
    """Parts of one expert's attention, the core that both experts share, and the class that applies the linears of both."""

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type
    core_attention: ModuleSpec | type
    qk_layernorm: ModuleSpec | type | None = None
    linear_pair: type[LinearPair] = LinearPair
    gen: AttentionSubmodules | None = None


class AttentionExpert(MegatronModule):
    """Fused QKV (per KV group: its query heads, key, value), QK-norm and output projection of one expert."""

    def __init__(self, config: TransformerConfig, submodules: AttentionSubmodules) -> None:
        super().__init__(config=config)
        tp = config.tensor_model_parallel_size
        self.head_dim = config.kv_channels
        # With more ranks than key/value heads, ``ranks_per_group`` ranks share the query heads of one group.
        self.ranks_per_group = max(1, tp // config.num_query_groups)
        self.groups = max(1, config.num_query_groups // tp)
        self.heads_per_group = config.num_attention_heads // (config.num_query_groups * self.ranks_per_group)
        query = config.kv_channels * config.num_attention_heads
        self.linear_qkv = build_module(
            submodules.linear_qkv, config.hidden_size, query + 2 * config.kv_channels * config.num_query_groups, config=config,
            init_method=config.init_method, bias=config.add_qkv_bias, gather_output=False, skip_bias_add=False,
        )  # fmt: skip
        self.linear_proj = build_module(
            submodules.linear_proj, query, config.hidden_size, config=config, init_method=config.output_layer_init_method,
            bias=False, input_is_parallel=True, skip_bias_add=False,
        )  # fmt: skip
        if submodules.qk_layernorm is not None:
            # Every tensor-parallel rank normalises different heads, so the gradients of these replicated weights are summed over ranks.
            norm = {"config": config, "hidden_size": config.kv_channels, "eps": config.layernorm_epsilon, "sequence_parallel": tp > 1}
            self.q_layernorm = build_module(submodules.qk_layernorm, **norm)
            self.k_layernorm = build_module(submodules.qk_layernorm, **norm)

    def heads(self, mixed: torch.Tensor) -> torch.Tensor:
        """Reshape the output of ``linear_qkv`` to KV groups (queries, key, value), [s, groups, heads_per_group + 2, head_dim]."""
        if self.ranks_per_group > 1:
            mixed = self._local_queries(mixed)
        return mixed.view(mixed.shape[0], self.groups, self.heads_per_group + 2, self.head_dim)

    def head_weights(self) -> torch.Tensor:
        """Return the QK-norm weights of a group's query heads, then its key, [heads_per_group + 1, head_dim]."""
        return torch.cat([self.q_layernorm().expand(self.heads_per_group, -1), self.k_layernorm()[None]])

    def _local_queries(self, mixed: torch.Tensor) -> torch.Tensor:
        """Return this rank's queries and the key and value it shares, from its columns of a group's [q..q k v]."""
        group = kv_sharing_group()
        columns = gather_columns(mixed, group).unflatten(-1, (-1, self.head_dim))
        first_head = group.rank() * self.heads_per_group
        return torch.cat([columns[:, first_head : first_head + self.heads_per_group], columns[:, -2:]], dim=1)


class CoreAttention(MegatronModule):
    """Softmax attention under the pack's mask. The attention plan chooses the kernel."""

    def __init__(self, config: TransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.recompute = recomputes(config, "core_attn")

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: PackContext) -> torch.Tensor:
        """Attend with queries [s, heads, d] and keys and values [s, groups, d]; return [s, heads * d]."""

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return context.attention.attend(query, key, value, self.layer_number)

        return recomputed(attend, query, key, value) if self.recompute else attend(query, key, value)


class SelfAttention(MegatronModule, UsesKernels):
    """Attention of a layer: the projections of each expert around one core over all tokens."""

    def __init__(
        self, config: TransformerConfig, submodules: AttentionSubmodules, layer_number: int, two_experts: bool, freeze_und: bool
    ) -> None:
        super().__init__(config=config)
        self.freeze_und = freeze_und
        pair = ExpertPair(
            config,
            lambda: AttentionExpert(config, submodules),
            two_experts,
            lambda: AttentionExpert(config, submodules.gen or submodules),
        )
        self.und = pair.und
        if pair.two_experts:
            self.gen = pair.gen
        self.qkv, self.proj = (
            submodules.linear_pair(*(getattr(expert, name) for expert in pair.modules_of_both)) for name in ("linear_qkv", "linear_proj")
        )
        self.core_attention = build_module(submodules.core_attention, config=config, layer_number=layer_number)
        # Kept out of the module tree, where a second path to the same weights would appear twice in the state.
        self.__dict__["exchange"] = ExpertExchange(config)

    def forward(self, parts: Sequence[torch.Tensor], local_rows: int, context: PackContext) -> torch.Tensor:
        """Attend with the normed rows of both experts that this rank holds; return [local rows, h]."""
        und, gen = self.exchange.enter(parts, local_rows, context)
        experts = (self.und, self.gen if hasattr(self, "gen") else self.und)
        und_rows, gen_rows = (expert.heads(rows) for expert, rows in zip(experts, self.qkv(und, gen, context.draws), strict=True))
        mixed = torch.cat([und_rows.detach() if self.freeze_und else und_rows, gen_rows])
        query_key, value = mixed.split([mixed.shape[2] - 1, 1], dim=2)
        query, key = self._norm_and_rotate(query_key, experts, context).split([mixed.shape[2] - 2, 1], dim=2)
        attended = self.core_attention(query.flatten(1, 2), key.squeeze(2), value.squeeze(2), context)
        und_attended, gen_attended = attended.split([context.n_und, context.n_gen])
        und_out, gen_out = self.proj(und_attended, gen_attended, context.draws)
        return self.exchange.leave([und_out.detach() if self.freeze_und else und_out, gen_out], context)

    def _norm_and_rotate(
        self, query_key: torch.Tensor, experts: tuple[AttentionExpert, AttentionExpert], context: PackContext
    ) -> torch.Tensor:
        """Apply QK-norm, by each token's expert, and rotary positions to queries and keys together."""
        rows = query_key.shape[0]
        cos, sin = context.cos[:rows], context.sin[:rows]
        if not hasattr(experts[0], "q_layernorm"):
            return rotate(query_key, cos, sin, self.kernels)
        und, gen = (expert.head_weights() for expert in experts)
        if self.freeze_und:
            und = und.detach()
        return norm_and_rotate(query_key, und, gen, context.n_und, experts[0].q_layernorm.eps, cos, sin, self.kernels)
