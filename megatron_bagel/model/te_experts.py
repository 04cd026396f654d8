# SPDX-License-Identifier: Apache-2.0
"""The sparse experts of a rank as Transformer Engine's grouped linears (``--moe_grouped_gemm``). They need a GPU.

Megatron-Core's ``TEGroupedMLP`` computes in the same way, but owns its weights under other names. Here they stay in the MLPs of
``NamedExperts``, so checkpoints, model folders and optimizer groups are those of the sequential experts.
"""

from __future__ import annotations

from typing import Any

import torch
import transformer_engine.pytorch as te
from torch.nn.functional import silu

from megatron_bagel.model.named_experts import NamedExperts


class GroupedExperts(NamedExperts):
    """Sequential experts whose products run as one grouped product for each of the two matrices."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Not submodules: they own no weights, and a checkpoint must not see them.
        self.__dict__["grouped"] = tuple(self._grouped(name) for name in ("linear_fc1", "linear_fc2"))

    def forward(
        self, permuted_local_hidden_states: torch.Tensor, tokens_per_expert: torch.Tensor, permuted_probs: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """Apply the experts.

        Args:
            permuted_local_hidden_states: Rows sorted by expert, [rows, h].
            tokens_per_expert: The rows of each of the rank's experts.
            permuted_probs: The weight of each row's choice, [rows].

        Returns:
            The weighted results [rows, h], and None for the bias, as Megatron-Core's experts do.
        """
        rows = tokens_per_expert.tolist()
        gate, up = self._product(0, "linear_fc1", permuted_local_hidden_states, rows).chunk(2, dim=-1)
        product = (silu(gate) * up * permuted_probs.unsqueeze(-1)).to(permuted_local_hidden_states.dtype)
        return self._product(1, "linear_fc2", product, rows), None

    def _grouped(self, linear: str) -> torch.nn.Module:
        """Return a grouped linear without weights, because the first call gives it those of the experts."""
        weight: torch.Tensor = getattr(self.local_experts[0], linear).weight
        outputs, inputs = weight.shape
        return te.GroupedLinear(
            self.num_local_experts, inputs, outputs, bias=False, params_dtype=weight.dtype, parallel_mode=None, device="meta"
        )

    def _product(self, number: int, linear: str, rows: torch.Tensor, rows_per_expert: list[int]) -> torch.Tensor:
        grouped = self.__dict__["grouped"][number]
        for expert, mlp in enumerate(self.local_experts):
            weight = getattr(mlp, linear).weight
            if getattr(grouped, f"weight{expert}") is not weight:
                setattr(grouped, f"weight{expert}", weight)
        result: torch.Tensor = grouped(rows, rows_per_expert)
        return result
