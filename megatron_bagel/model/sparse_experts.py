# SPDX-License-Identifier: Apache-2.0
"""The MLPs of a layer where at least one expert kind is sparse. The other kind may be dense.

A sparse MLP takes the rows that a tensor-parallel rank holds itself: the dispatcher moves them to their experts, so no rank gathers
the others' rows first. A dense MLP beside it uses the layer's exchange as usual.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.model.experts import ExpertExchange, MLPSubmodules, SwiGLU, join
from megatron_bagel.model.fused import swiglu
from megatron_bagel.model.pack_context import PackContext
from megatron_bagel.model.sparse_mlp import GlobalBatchRouter, SparseMLP


class SparseExperts(MegatronModule):
    """``und`` serves text and ViT tokens, ``gen`` VAE tokens. A layer kind with one MLP has only ``und``, for all tokens."""

    def __init__(
        self, config: TransformerConfig, submodules: MLPSubmodules, two_experts: bool, layer_number: int, sparse_kinds: Collection[str]
    ) -> None:
        super().__init__(config=config)
        self.two_experts = two_experts

        def mlp(kind: str) -> SparseMLP | SwiGLU:
            return SparseMLP(config, layer_number) if kind in sparse_kinds or not two_experts else SwiGLU(config, submodules)

        self.und = mlp("und")
        if two_experts:
            self.gen = mlp("gen")

    def expert_kinds(self) -> dict[str, GlobalBatchRouter]:
        """Return the routers by the kind of tokens that they see: "und", "gen", or "both" for one MLP that serves all."""
        mlps = {"und": self.und, "gen": self.gen} if self.two_experts else {"both": self.und}
        return {kind: mlp.router for kind, mlp in mlps.items() if isinstance(mlp, SparseMLP)}

    def forward(
        self, und: torch.Tensor, gen: torch.Tensor, rows: int, context: PackContext, exchange: ExpertExchange, freeze_und: bool
    ) -> torch.Tensor:
        """Apply the MLPs to this rank's rows.

        Args:
            und: Rows of the understanding expert, [n_und, h].
            gen: Rows of the generation expert, [n_gen, h].
            rows: The rows of the result; those after the two kinds are padding.
            context: The context of the pack.
            exchange: The layer's tensor-parallel exchange, for a dense MLP.
            freeze_und: Whether the understanding rows of the result get no gradient.

        Returns:
            The results, [rows, h].
        """
        if not self.two_experts:
            und, gen = _sparse(self.und, torch.cat([und, gen]), exchange.sequence_parallel).split([len(und), len(gen)])
            return join([und.detach() if freeze_und else und, gen], rows)
        parts, dense = [], None
        for kind, mlp, tokens in (("und", self.und, und), ("gen", self.gen, gen)):
            if isinstance(mlp, SparseMLP):
                frozen = kind == "und" and freeze_und
                # Inputs are detached too: the dispatcher keeps its last results, and with them would keep their graph.
                result = _sparse(mlp, tokens.detach() if frozen else tokens, exchange.sequence_parallel)
                parts.append(result.detach() if frozen else result)
                continue
            parts.append(torch.zeros_like(tokens))
            dense = _dense(mlp, kind, (und, gen), rows, context, exchange, freeze_und)
        return join(parts, rows) if dense is None else join(parts, rows) + dense


def _sparse(mlp: torch.nn.Module, tokens: torch.Tensor, sequence_parallel: bool) -> torch.Tensor:
    """Apply a sparse MLP. Generation skips it for no tokens, unless other ranks wait for this one."""
    if not isinstance(mlp, SparseMLP):
        raise TypeError(f"{type(mlp).__name__} is not a sparse MLP")
    whole = not sequence_parallel and mlp.config.tensor_model_parallel_size > 1
    is_alone = whole or parallel_state.get_expert_tensor_and_model_parallel_world_size() == 1
    if not len(tokens) and not torch.is_grad_enabled() and is_alone:
        return tokens
    return _divided(mlp, tokens) if whole else mlp.rows(tokens)


def _divided(mlp: SparseMLP, tokens: torch.Tensor) -> torch.Tensor:
    """Apply a sparse MLP to rows [n, h] that every tensor-parallel rank has, as in generation: each rank routes a part of them."""
    group = parallel_state.get_tensor_model_parallel_group()
    share = -(-len(tokens) // group.size())
    own_rows = tokens[group.rank() * share : (group.rank() + 1) * share]
    results = tokens.new_zeros((share * group.size(), tokens.shape[1]))
    own_results = tokens.new_zeros((share, tokens.shape[1]))
    own_results[: len(own_rows)] = mlp.rows(own_rows)
    dist.all_gather_into_tensor(results, own_results, group=group)
    return results[: len(tokens)]


def _dense(
    mlp: SwiGLU, kind: str, normed: tuple[torch.Tensor, torch.Tensor], rows: int, context: PackContext, exchange: ExpertExchange,
    freeze_und: bool,
) -> torch.Tensor:  # fmt: skip
    """Return the results of a dense MLP for the rows of ``kind``, and zeros for the other rows."""
    results = []
    for part_kind, tokens in zip(("und", "gen"), exchange.enter(normed, rows, context), strict=True):
        if part_kind != kind:
            results.append(torch.zeros_like(tokens))
            continue
        result = mlp.linear_fc2(swiglu(mlp.linear_fc1(tokens), mlp.kernels))
        results.append(result.detach() if kind == "und" and freeze_und else result)
    return exchange.leave(results, context)
