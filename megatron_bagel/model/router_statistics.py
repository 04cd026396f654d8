# SPDX-License-Identifier: Apache-2.0
"""What a router did in one step, summed over this rank's microbatches: choices per expert, dropped choices, entropy and losses."""

from __future__ import annotations

import torch


class RouterStatistics:
    """Sums over tokens. They are additive, so ranks and microbatches can be summed.

    Recomputed layers count once, in the pass that has gradients.
    """

    #: Numbers of a router besides the load of its experts: tokens, dropped choices, entropy, balance loss, z-loss.
    EXTRA = 5

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._sums: torch.Tensor | None = None

    def clear(self) -> None:
        """Start from zero."""
        self._sums = None

    def count(self, logits: torch.Tensor, routing_map: torch.Tensor, topk: int) -> None:
        """Add tokens.

        Args:
            logits: The logits of the tokens that are no padding, [tokens, experts].
            routing_map: The choices after tokens were dropped, [rows, experts]; rows of padding choose none.
            topk: The choices of a token.
        """
        sums = self._on(logits.device)
        load = routing_map.sum(0, dtype=torch.float64)
        sums[: self._num_experts] += load
        log_probs = torch.log_softmax(logits.float(), -1)
        entropy = -(log_probs.exp() * log_probs).sum(dtype=torch.float64)
        tokens = len(logits)
        sums[self._num_experts] += tokens
        sums[self._num_experts + 1] += tokens * topk - load.sum()
        sums[self._num_experts + 2] += entropy

    def add_losses(self, balance: torch.Tensor | None = None, z: torch.Tensor | None = None) -> None:
        """Add shares of the means over the global batch, without their coefficients."""
        for index, loss in ((3, balance), (4, z)):
            if loss is not None:
                self._on(loss.device)[self._num_experts + index] += loss.double()

    def sums(self, device: torch.device) -> torch.Tensor:
        """Return all sums, float64 [experts + EXTRA]."""
        return self._on(device)

    def _on(self, device: torch.device) -> torch.Tensor:
        if self._sums is None:
            self._sums = torch.zeros(self._num_experts + self.EXTRA, dtype=torch.float64, device=device)
        return self._sums
