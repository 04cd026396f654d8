# SPDX-License-Identifier: Apache-2.0
"""The bytes that one sparse MLP saves for its backward pass, term by term as Megatron-Core's ``MoELayer`` computes it."""

from __future__ import annotations

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.architecture.sparse import SparseArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.planning.routed_rows import RoutedRows

FP32, INT64 = 4, 8


def sparse_mlp_bytes(llm: LLMArch, megatron: MegatronArguments, routed: RoutedRows, width: int) -> int:
    """Return the bytes that a sparse MLP saves, inputs included.

    Args:
        llm: The decoder.
        megatron: The router's settings, and the dispatcher.
        routed: Its rows on the rank.
        width: The bytes of a number of the hidden states.
    """
    sparse = llm.sparse
    if sparse is None:
        return 0
    probs_width = {"fp32": 4, "fp64": 8}.get(megatron.moe_router_dtype or "", width)
    # Gate and up in one tensor, silu(gate), up plus its offset, the product, and the product times the weight of the choice.
    expert = 6 * routed.expert_width(llm)
    # The router and the shared expert read the rank's own rows.
    size = routed.rows * llm.hidden_size * width + _router_bytes(sparse, megatron, routed.rows, probs_width)
    size += routed.received * ((llm.hidden_size + expert) * width + probs_width)
    size += routed.rows * _shared_numbers(llm, sparse) * width
    if megatron.moe_token_dispatcher_type == "allgather":
        return size + _gathered_bytes(sparse, routed, megatron.expert_model_parallel_size, probs_width)
    # The dispatcher keeps the row of every choice, and selects weights by a mask.
    return size + routed.sent * INT64 + routed.rows * sparse.num_experts * (probs_width + 1)


def _router_bytes(sparse: SparseArch, megatron: MegatronArguments, rows: int, probs_width: int) -> int:
    """Return the bytes of the choices, their weights and the two losses."""
    scores = sparse.num_experts_per_tok if sparse.norm_topk_prob else sparse.num_experts
    size = rows * (sparse.num_experts_per_tok * INT64 + scores * FP32)
    if megatron.moe_aux_loss_coeff:
        size += rows * (sparse.num_experts * FP32 + sparse.num_experts_per_tok * INT64 + 1)
    if megatron.moe_z_loss_coeff:
        size += rows * ((sparse.num_experts + 1) * probs_width + 1)
    return size


def _shared_numbers(llm: LLMArch, sparse: SparseArch) -> int:
    """Return the numbers that the shared expert saves for a token: gate and up twice over, product; its result and the gate's score."""
    numbers = 5 * (sparse.shared_expert_intermediate_size or 0)
    return numbers + llm.hidden_size + 1 if sparse.shared_expert_gate else numbers


def _gathered_bytes(sparse: SparseArch, routed: RoutedRows, expert_parallel: int, probs_width: int) -> int:
    """Return the bytes of the all-gather dispatcher, which holds the choices of all ranks' rows for this rank's experts."""
    rows = routed.rows * expert_parallel * routed.copies
    return routed.received * INT64 + rows * routed.experts * (probs_width + 1) + routed.rows
