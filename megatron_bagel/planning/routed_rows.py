# SPDX-License-Identifier: Apache-2.0
"""The rows of each sparse MLP on a rank before and after dispatch, if routers choose all experts equally often.

Real routers are less even: the fullest expert rank of a step has more rows, and a run logs how many (``experts/.../max_load``).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.planning.rank_tokens import RankTokens


@dataclass(frozen=True)
class RoutedRows:
    """One sparse MLP on one rank.

    Attributes:
        kind: ``und`` or ``gen``, or ``both`` for an MLP that serves all tokens.
        rows: The rank's own rows.
        choices: The experts that serve a row.
        copies: The expert-tensor-parallel ranks that each compute a slice of every row.
        experts: The experts of the rank.
    """

    kind: str
    rows: int
    choices: int
    copies: int
    experts: int

    @property
    def sent(self) -> int:
        """Return the rows that the rank sends to experts: one for each choice."""
        return self.rows * self.choices

    @property
    def received(self) -> int:
        """Return the rows that the rank's experts work on."""
        return self.sent * self.copies

    def expert_width(self, llm: LLMArch) -> int:
        """Return the width of an expert's slice on the rank."""
        return llm.sparse.moe_intermediate_size // self.copies if llm.sparse is not None else 0


def routed_rows(llm: LLMArch, megatron: MegatronArguments, tokens: RankTokens, layer: int) -> list[RoutedRows]:
    """Return the sparse MLPs of a layer, which is counted from 0. Sequence-parallel ranks count with an average share of a kind's rows."""
    if llm.sparse is None or not llm.is_sparse(layer):
        return []
    tensor = megatron.tensor_model_parallel_size
    counts = {"und": tokens.und, "gen": tokens.gen} if llm.has_gen_mlp else {"both": tokens.num_tokens}
    copies, choices = megatron.expert_tensor_size(tensor), llm.sparse.num_experts_per_tok
    experts = llm.sparse.num_experts // megatron.expert_model_parallel_size
    return [
        RoutedRows(kind, -(-count // tensor) if megatron.sequence_parallel else count, choices, copies, experts)
        for kind, count in counts.items()
        if kind == "both" or llm.is_sparse(layer, kind)
    ]


def dense_kinds(llm: LLMArch, layer: int) -> list[str]:
    """Return the kinds of tokens ("und", "gen") that a dense MLP serves in a layer."""
    return [kind for kind in ("und", "gen") if not llm.is_sparse(layer, kind)]
