"""The projections around attention, once per expert: tokens meet only inside the shared core attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.model.context import PackContext
from megatron_bagel.model.experts import ExpertExchange, ExpertPair
from megatron_bagel.model.rope import rotate


@dataclass
class AttentionSubmodules:
    """Parts of one expert's attention, and the core they share."""

    linear_qkv: ModuleSpec | type
    linear_proj: ModuleSpec | type
    core_attention: ModuleSpec | type
    qk_layernorm: ModuleSpec | type | None = None


class AttentionExpert(MegatronModule):
    """Fused QKV (per KV group: its query heads, key, value), QK-norm and output projection of one expert."""

    def __init__(self, config: TransformerConfig, submodules: AttentionSubmodules) -> None:
        super().__init__(config=config)
        tp = config.tensor_model_parallel_size
        self.head_dim = config.kv_channels
        self.groups = config.num_query_groups // tp
        self.heads_per_group = config.num_attention_heads // config.num_query_groups
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
            # Every tensor-parallel rank norms heads of its own, so gradients of these replicated weights are summed over the ranks.
            norm = {"config": config, "hidden_size": config.kv_channels, "eps": config.layernorm_epsilon, "sequence_parallel": tp > 1}
            self.q_layernorm = build_module(submodules.qk_layernorm, **norm)
            self.k_layernorm = build_module(submodules.qk_layernorm, **norm)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[s, h] -> per KV group its queries and key after QK-norm, and its value.

        Shapes [s, groups, heads_per_group + 1, head_dim] and [s, groups, head_dim].
        """
        mixed = self.linear_qkv(x).view(x.shape[0], self.groups, self.heads_per_group + 2, self.head_dim)
        qk, value = mixed[:, :, :-1], mixed[:, :, -1]
        if not hasattr(self, "q_layernorm"):
            return qk, value
        # Query and key heads are normed in one call; only the weights differ.
        weights = torch.cat([self.q_layernorm.weight.expand(self.heads_per_group, -1), self.k_layernorm.weight[None]])
        normed = F.rms_norm(qk.float(), (self.head_dim,), None, self.q_layernorm.eps)
        return normed.to(qk.dtype) * weights, value


class CoreAttention(MegatronModule):
    """Softmax attention under the pack's mask; which kernel does it is the plan's choice."""

    def __init__(self, config: TransformerConfig, layer_number: int) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: PackContext) -> torch.Tensor:
        """[s, heads, d] and [s, groups, d] -> [s, heads * d]."""
        return context.attention.attend(query, key, value, self.layer_number)


class SelfAttention(MegatronModule):
    """Attention of a layer: per-expert projections around one core over all tokens."""

    def __init__(self, config: TransformerConfig, submodules: AttentionSubmodules, layer_number: int, two: bool, freeze_und: bool) -> None:
        super().__init__(config=config)
        self.freeze_und = freeze_und
        pair = ExpertPair(config, lambda: AttentionExpert(config, submodules), two)
        self.und = pair.und
        if pair.two:
            self.gen = pair.gen
        self.core_attention = build_module(submodules.core_attention, config=config, layer_number=layer_number)
        # Kept out of the module tree: a second path to the same weights would appear twice in the state.
        self.__dict__["exchange"] = ExpertExchange(config)

    def forward(self, parts: list[torch.Tensor], local_rows: int, context: PackContext) -> torch.Tensor:
        """Normed rows of both experts held here -> [local rows, h]."""
        und, gen = self.exchange.enter(parts, local_rows, context)
        experts = (self.und, self.gen if hasattr(self, "gen") else self.und)
        (und_qk, und_v), (gen_qk, gen_v) = experts[0].qkv(und), experts[1].qkv(gen)
        if self.freeze_und:
            und_qk, und_v = und_qk.detach(), und_v.detach()
        real = context.n_und + context.n_gen
        qk, value = torch.cat([und_qk, gen_qk]), torch.cat([und_v, gen_v])
        qk = rotate(qk, context.cos[:real], context.sin[:real])
        query = qk[:, :, :-1].flatten(1, 2)
        mixed = self.core_attention(query, qk[:, :, -1], value, context)
        und_out = experts[0].linear_proj(mixed[: context.n_und])
        gen_out = experts[1].linear_proj(mixed[context.n_und :])
        return self.exchange.leave([und_out.detach() if self.freeze_und else und_out, gen_out], context)
