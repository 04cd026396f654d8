# SPDX-License-Identifier: Apache-2.0
"""Lists the collectives that move tokens to their sparse experts and back, for Megatron-Core's two dispatchers.

The rows of a rank are those of balanced routers (``routed_rows.py``). Sums for the balance loss, a few numbers for each sparse MLP, are not
in the list.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence

from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.planning.activations import Recompute
from megatron_bagel.planning.collective import Collective
from megatron_bagel.planning.rank_tokens import RankTokens
from megatron_bagel.planning.routed_rows import RoutedRows, routed_rows

FP32, INT64 = 4, 8


class ExpertCommunication:
    """Lists the collectives of the sparse MLPs of a rank."""

    def __init__(self, inputs: CostInputs, recompute: Recompute) -> None:
        megatron, self.llm = inputs.megatron, inputs.arch.llm
        self.megatron, self.recompute, self.freeze_und = megatron, recompute, inputs.frozen.und
        self.ep = megatron.expert_model_parallel_size
        self.etp = megatron.expert_tensor_size(megatron.tensor_model_parallel_size)
        self.width = 2 if inputs.sizes.bf16 else FP32
        self.probs_width = {"fp32": 4, "fp64": 8}.get(megatron.moe_router_dtype or "", self.width)

    def calls(self, layers: Sequence[int], repeated: Collection[int], tokens: RankTokens) -> Iterator[Collective]:
        """Yield the collectives of one pack.

        Args:
            layers: The decoder layers of the rank's stage.
            repeated: Those of them that have a second forward pass.
            tokens: The sizes of the pack on the rank.
        """
        tp, sparse = self.megatron.tensor_model_parallel_size, self.llm.sparse
        if sparse is None or tp * self.ep * self.etp == 1:
            return
        gathers = self.megatron.moe_token_dispatcher_type == "allgather"
        passes: Counter[RoutedRows] = Counter()
        forward_passes: Counter[RoutedRows] = Counter()
        for layer in layers:
            for routed in routed_rows(self.llm, self.megatron, tokens, layer):
                passes[routed] += 1
                forward_passes[routed] += 1 + (layer in repeated or "mlp" in self.recompute.modules)
        for routed, forward in forward_passes.items():
            backward = 0 if self.freeze_und and routed.kind == "und" else passes[routed]
            yield from self._gathered(routed, forward, backward) if gathers else self._exchanged(routed, forward, backward)
            if sparse.shared_expert_intermediate_size:
                # Megatron-Core's linears gather their input again in the backward pass.
                size = tp * routed.rows * self.llm.hidden_size * self.width
                yield Collective("tensor", "rows of the shared expert", "all_gather", tp, size, forward + 2 * backward, tp)
                yield Collective("tensor", "rows of the shared expert", "reduce_scatter", tp, size, forward + backward, tp)

    def _exchanged(self, routed: RoutedRows, forward: int, backward: int) -> Iterator[Collective]:
        """Yield what the all-to-all dispatcher issues. Each way has as many bytes back in the backward pass."""
        experts = self.llm.sparse.num_experts if self.llm.sparse is not None else 0
        ranks, row = self.ep * self.etp, self.llm.hidden_size * self.width
        yield Collective("expert", "tokens per expert", "all_gather", ranks, ranks * experts * INT64, forward, ranks)
        yield Collective("expert", "tokens to experts", "all_to_all", self.ep, routed.sent * row, forward + backward, ranks)
        yield Collective(
            "expert", "weights of choices", "all_to_all", self.ep, routed.sent * self.probs_width, forward + backward, ranks
        )  # fmt: skip
        yield Collective("expert", "results of experts", "all_to_all", self.ep, routed.sent * row, forward + backward, ranks)
        for payload, size in (("tokens", routed.received * row), ("weights of choices", routed.received * self.probs_width)):
            yield Collective("expert", f"{payload} of divided experts", "all_gather", self.etp, size, forward, self.etp)
            yield Collective("expert", f"{payload} of divided experts", "reduce_scatter", self.etp, size, backward, self.etp)
        yield Collective("expert", "results of divided experts", "reduce_scatter", self.etp, routed.received * row, forward, self.etp)
        yield Collective("expert", "results of divided experts", "all_gather", self.etp, routed.received * row, backward, self.etp)

    def _gathered(self, routed: RoutedRows, forward: int, backward: int) -> Iterator[Collective]:
        """Yield what the all-gather dispatcher issues: every rank gets the rows of all."""
        experts = self.llm.sparse.num_experts if self.llm.sparse is not None else 0
        ranks = self.ep * self.etp
        rows = ranks * routed.rows
        hidden, probs = rows * self.llm.hidden_size * self.width, rows * experts * self.probs_width
        yield Collective("expert", "choices", "all_gather", ranks, rows * experts, forward, ranks)
        for payload, size in (("weights of choices", probs), ("tokens", hidden)):
            yield Collective("expert", payload, "all_gather", ranks, size, forward, ranks)
            yield Collective("expert", payload, "reduce_scatter", ranks, size, backward, ranks)
        yield Collective("expert", "results of experts", "reduce_scatter", ranks, hidden, forward, ranks)
        yield Collective("expert", "results of experts", "all_gather", ranks, hidden, backward, ranks)
