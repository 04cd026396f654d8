# SPDX-License-Identifier: Apache-2.0
"""What a decoder layer needs to know about the pack; Megatron's ``TransformerBlock`` carries it as ``packed_seq_params``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_bagel.model.keyed_dropout import Draws
from megatron_bagel.model.rope import rotary_table


class AttentionPlan(Protocol):
    """How the tokens of a rank attend. A plan is made once per pack and every layer uses it."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """Attend with ``q`` [s, heads, head_dim], ``k`` and ``v`` [s, kv_heads, head_dim]; return [s, heads * head_dim]."""


@dataclass
class PackContext:
    """Expert counts and rotary angles of a pack.

    Slots [0, n_und) are understanding tokens, [n_und, n_und + n_gen) generation tokens, and the rest padding. ``cos`` and
    ``sin`` are [s, 1, 1, head_dim / 2] in the dtype of the hidden states. ``draws`` are for the dropout of adapters: those of both
    experts' tokens.
    """

    n_und: int
    n_gen: int
    length: int
    cos: torch.Tensor
    sin: torch.Tensor
    attention: AttentionPlan
    draws: tuple[Draws | None, Draws | None] = (None, None)

    @classmethod
    def of(
        cls, n_und: int, n_gen: int, position_ids: torch.Tensor, attention: AttentionPlan, head_dim: int, theta: float, dtype: torch.dtype
    ) -> PackContext:
        """Build the context of the slots whose RoPE positions are ``position_ids`` [s]."""
        # Both halves of a row are equal; the angles are computed in fp32 and rounded once.
        cos, sin = (table[:, None, None, : head_dim // 2].to(dtype) for table in rotary_table(position_ids, head_dim, theta))
        return cls(n_und, n_gen, len(position_ids), cos, sin, attention)

    def rows_by_expert(self, hidden: torch.Tensor, first_slot: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the understanding and the generation rows of ``hidden`` [rows, ...], whose first row is slot ``first_slot``."""
        return self.slice_by_expert(hidden, first_slot, self.n_und, self.n_gen)

    def und_rows(self, rows: int, first_slot: int = 0) -> int:
        """Return how many of ``rows`` rows, the first of which is slot ``first_slot``, are understanding tokens."""
        return min(max(self.n_und - first_slot, 0), rows)

    @staticmethod
    def slice_by_expert(hidden: torch.Tensor, first_slot: int, n_und: int, n_gen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same rows for explicit token counts."""
        und_rows = min(max(n_und - first_slot, 0), hidden.shape[0])
        valid_rows = min(max(n_und + n_gen - first_slot, 0), hidden.shape[0])
        # One torch.split instead of two slices: its backward pass is one concatenation, not two padded copies and a sum.
        return hidden.split([und_rows, valid_rows - und_rows, hidden.shape[0] - valid_rows])[:2]
