# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's MoE layer as the MLP of one expert kind: only the tokens of that kind are routed, and padding never is.

Router, dispatcher, experts and both auxiliary losses are Megatron-Core's. Two things differ. The losses are divided by the tokens
of the global batch, as every loss here, because a rank holds any number of tokens of a kind. Checkpoints name every expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules as MegatronMLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.model.named_experts import NamedExperts
from megatron_bagel.model.router_statistics import RouterStatistics
from megatron_bagel.platform.megatron_compat import CallableSpec


class GlobalBatchRouter(TopKRouter):
    """Megatron-Core's router with losses that are shares of a mean over the global batch.

    ``global_tokens`` is the number of tokens of the global batch that routers of this kind see. The step sets it before the first
    microbatch (``set_global_tokens``). Summed over packs and ranks, the losses are then coeff * mean over tokens. A pack's balance
    is measured over the whole pack, on all tensor- and context-parallel ranks that share it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.global_tokens: int | None = None
        self.statistics = RouterStatistics(self.config.num_moe_experts)

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Return the logits [..., experts]. Megatron-Core's function cannot reshape the result for no tokens."""
        if input.numel():
            return super().gating(input)
        return torch.nn.functional.linear(input, self.weight)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights and the choice of experts, both [tokens, experts]. Masked rows choose none."""
        flat_logits = logits.view(-1, self.config.num_moe_experts)
        padding = (
            torch.zeros(len(flat_logits), dtype=torch.bool, device=logits.device) if padding_mask is None else padding_mask.reshape(-1)
        )
        # Megatron-Core expects its mask as [s, b], one batch here.
        probs, routing_map = super().routing(logits, padding.unsqueeze(1))
        if padding_mask is not None:
            probs, routing_map = probs.masked_fill(padding.unsqueeze(1), 0.0), routing_map & ~padding.unsqueeze(1)
        if self.training and torch.is_grad_enabled():
            self.statistics.count(flat_logits.detach()[~padding], routing_map, self.topk)
        return probs, routing_map

    def _apply_aux_loss(
        self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, routing_map: torch.Tensor, with_padding_mask: bool = False
    ) -> torch.Tensor:
        """Attach the load-balancing loss of this rank's tokens to ``probs``."""
        coeff = self.get_aux_loss_coeff("aux_loss")
        counts, _, pack_tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk, with_padding_mask=True
        )
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=counts,
            total_num_tokens=pack_tokens.clamp(min=1),
            topk=self.topk,
            num_experts=self.config.num_moe_experts,
            moe_aux_loss_coeff=coeff,
        ) * (pack_tokens / self._global_tokens())
        self.statistics.add_losses(balance=loss.detach() / coeff)
        return MoEAuxLossAutoScaler.apply(probs, loss)

    def apply_z_loss(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Attach the z-loss of this rank's tokens to ``logits``."""
        coeff = self.config.moe_z_loss_coeff
        if coeff is None or not (self.training and torch.is_grad_enabled()):
            return logits
        valid_logits = logits if padding_mask is None else logits[~padding_mask.reshape(-1)]
        if not len(valid_logits):
            return logits
        loss = z_loss_func(valid_logits, coeff) * (len(valid_logits) / self._global_tokens())
        self.statistics.add_losses(z=loss.detach() / coeff)
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def _apply_expert_bias(self, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None) -> None:
        """Do nothing: there is no bias of experts here, and Megatron-Core's function would be compiled first."""

    def _global_tokens(self) -> int:
        if self.global_tokens is None:
            raise RuntimeError("the router does not know the tokens of the global batch: call set_global_tokens before the forward pass")
        return max(1, self.global_tokens)


class UnequalSharedExpert(SharedExpertMLP):
    """Megatron-Core's shared expert for tensor-parallel ranks with different numbers of rows, which it gathers as if they were equal."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map this rank's tokens [n, 1, h] to [n, 1, h]. Every tensor-parallel rank calls it, even without a token."""
        if self.config.tensor_model_parallel_size == 1:
            return super().forward(hidden_states)
        rows = len(hidden_states)
        slots = most_rows(rows, parallel_state.get_tensor_model_parallel_group(), hidden_states.device)
        padded = torch.nn.functional.pad(hidden_states, (0, 0, 0, 0, 0, slots - rows))
        return super().forward(padded)[:rows]


def most_rows(rows: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """Return the largest number of rows of a rank of ``group``, and 1 at least: reductions need memory to reduce. Collective."""
    count = torch.tensor([rows], device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX, group=group)
    return max(1, int(count.item()))


class SparseMLP(MoELayer):
    """The sparse MLP of one expert kind in one layer. It takes a rank's share of the rows, with or without sequence parallelism."""

    def __init__(self, config: TransformerConfig, layer_number: int) -> None:
        if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
            config = copy(config)
            config.sequence_parallel = True
        linears = MegatronMLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        submodules = MoESubmodules(
            experts=CallableSpec(_experts_class(config), submodules=linears),
            shared_experts=CallableSpec(UnequalSharedExpert, submodules=linears),
            router=GlobalBatchRouter,
        )
        super().__init__(config, submodules, layer_number)
        self.set_layer_number(layer_number)

    def rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map this rank's tokens [n, h] to [n, h]. Every rank of the expert-parallel group calls it, even without a token.

        The all-gather dispatcher needs equally many rows on every rank, so it gets rows of padding that choose no expert.
        """
        if self.config.moe_token_dispatcher_type != "allgather":
            return self(tokens.unsqueeze(1))[0].squeeze(1)
        slots = most_rows(len(tokens), self.token_dispatcher.tp_ep_group, tokens.device)
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, slots - len(tokens)))
        mask = torch.arange(slots, device=tokens.device).unsqueeze(0) >= len(tokens)
        return self(padded.unsqueeze(1), padding_mask=mask)[0].squeeze(1)[: len(tokens)]


def _experts_class(config: TransformerConfig) -> type[NamedExperts]:
    """Return the class of the experts. Only ``--moe_grouped_gemm`` imports Transformer Engine."""
    if not config.moe_grouped_gemm:
        return NamedExperts
    from megatron_bagel.model.te_experts import GroupedExperts

    return GroupedExperts


def set_global_tokens(modules: torch.nn.Module, und: int, gen: int) -> None:
    """Tell all routers inside ``modules`` how many tokens of each kind the global batch has, and start their statistics from zero."""
    for kind, router in routers_of(modules):
        router.global_tokens = {"und": und, "gen": gen, "both": und + gen}[kind]
        router.statistics.clear()


def routers_of(modules: torch.nn.Module) -> Iterator[tuple[str, GlobalBatchRouter]]:
    """Yield each router inside ``modules`` with the kind of tokens that it sees: "und", "gen" or "both"."""
    for module in modules.modules():
        expert_kinds: Any = getattr(module, "expert_kinds", None)
        if expert_kinds is not None:
            yield from expert_kinds().items()
