# SPDX-License-Identifier: Apache-2.0
"""Flags of sparse experts, under Megatron-Core's names. docs/sparse_experts.md explains them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_bagel.config.flag import FREE, MUST_MATCH, SAID, flag, megatron_flag


@dataclass
class MoEArguments:
    """Flags of sparse experts. Those of the model follow the decoder's ``config.json`` where they are not given."""

    num_experts: int | None = megatron_flag(
        None, "Experts of each sparse MLP. Default: as the decoder's config.json says, which may be none.", minimum=1, on_resume=MUST_MATCH
    )
    moe_router_topk: int | None = megatron_flag(None, "Experts that serve a token.", minimum=1, on_resume=MUST_MATCH)
    moe_ffn_hidden_size: int | None = megatron_flag(
        None, "Width of one expert. Default: that of the dense MLP.", minimum=1, on_resume=MUST_MATCH
    )
    moe_layer_freq: list[int] = megatron_flag(
        [],
        "Layers with sparse MLPs: N makes every N-th layer sparse, beginning with the first; several numbers say 1 (sparse) or 0 (dense) "
        "for each layer.",
        on_resume=MUST_MATCH,
    )
    moe_first_k_dense: int = flag(0, "Layers at the start of the decoder whose MLPs stay dense.", minimum=0, on_resume=MUST_MATCH)
    moe_kinds: list[str] = flag(
        [],
        "Kinds of tokens whose MLPs are sparse: und (text and ViT tokens), gen (VAE tokens) or both. Default: both.",
        choices=("und", "gen"),
        on_resume=MUST_MATCH,
    )
    moe_router_pre_softmax: bool | None = megatron_flag(
        None,
        "Apply the softmax before the experts of a token are chosen, so that their weights need not sum to 1. moe_router_topk 1 needs it.",
        on_resume=MUST_MATCH,
    )
    moe_shared_expert_intermediate_size: int | None = megatron_flag(
        None, "Width of an expert that serves every token. Default: none.", minimum=1, on_resume=MUST_MATCH
    )
    moe_shared_expert_gate: bool | None = megatron_flag(None, "Scale the shared expert's result by a gate.", on_resume=MUST_MATCH)
    moe_router_dtype: Literal["fp32", "fp64"] | None = megatron_flag(
        None, "Precision of the router's logits. Default: that of the model.", on_resume=SAID
    )
    moe_aux_loss_coeff: float = megatron_flag(0.0, "Weight of the load-balancing loss of every sparse MLP.", minimum=0, on_resume=SAID)
    moe_z_loss_coeff: float = megatron_flag(0.0, "Weight of the loss that keeps the router's logits small.", minimum=0, on_resume=SAID)
    moe_expert_capacity_factor: float | None = megatron_flag(
        None,
        "Drop tokens beyond this factor times an expert's even share of a rank's tokens. Which tokens are dropped depends on the "
        "parallel sizes. Default: no token is dropped.",
        above=0,
        on_resume=SAID,
    )
    moe_token_drop_policy: Literal["probs", "position"] = megatron_flag(
        "probs", "Tokens that an expert keeps: those with the largest weights, or the first ones.", on_resume=SAID
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = megatron_flag(
        "alltoall",
        "How tokens reach their experts. allgather pads the tokens of each rank to an equal number; it suits few ranks.",
        on_resume=FREE,
    )
    moe_grouped_gemm: bool = megatron_flag(
        False,
        "Compute the experts of a rank in one grouped product of Transformer Engine, not one after the other. Needs a GPU and the package "
        "transformer-engine.",
        on_resume=FREE,
    )
    expert_model_parallel_size: int = megatron_flag(
        1,
        "Ranks that divide the experts. They are tensor-, context- or data-parallel ranks of one pipeline stage.",
        minimum=1,
        on_resume=FREE,
    )
    expert_tensor_parallel_size: int | None = megatron_flag(
        None, "Ranks that split every expert's matrices. Default: tensor_model_parallel_size.", minimum=1, on_resume=FREE
    )

    def expert_tensor_size(self, tensor_parallel: int) -> int:
        """Return the ranks that split an expert's matrices, of ``tensor_parallel`` ranks that split the other matrices."""
        return self.expert_tensor_parallel_size or tensor_parallel

    def llm_settings(self) -> dict[str, Any]:
        """Return the given settings of the model under the names that ``SparseArch.from_hf`` reads."""
        pre_softmax = self.moe_router_pre_softmax
        settings: dict[str, Any] = {
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.moe_router_topk,
            "moe_intermediate_size": self.moe_ffn_hidden_size,
            "moe_layer_freq": self.moe_layer_freq or None,
            "moe_first_k_dense": self.moe_first_k_dense or None,
            "norm_topk_prob": None if pre_softmax is None else not pre_softmax,
            "shared_expert_intermediate_size": self.moe_shared_expert_intermediate_size,
            "shared_expert_gate": self.moe_shared_expert_gate,
            "sparse_kinds": self.moe_kinds or None,
        }
        if self.num_experts is not None and pre_softmax is None:
            settings["norm_topk_prob"] = True  # Megatron's default; a Qwen3-MoE config.json that says nothing means False
        return {name: value for name, value in settings.items() if value is not None}
