"""What a decoder layer needs to know about the pack, handed through Megatron's TransformerBlock as ``packed_seq_params``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_bagel.model.rope import rotary_table


class AttentionPlan(Protocol):
    """How the tokens of a rank attend; made once per pack and used by every layer."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """``q`` [s, heads, head_dim], ``k`` and ``v`` [s, kv_heads, head_dim] -> [s, heads * head_dim]."""


@dataclass
class PackContext:
    """Expert split and positions of a pack: slots [0, n_und) are understanding tokens, [n_und, n_und + n_gen) generation
    tokens, the rest padding. ``cos`` and ``sin`` are [s, 1, 1, head_dim / 2], in the dtype of the hidden states."""

    n_und: int
    n_gen: int
    length: int
    cos: torch.Tensor
    sin: torch.Tensor
    attention: AttentionPlan

    @classmethod
    def of(
        cls, n_und: int, n_gen: int, position_ids: torch.Tensor, attention: AttentionPlan, head_dim: int, theta: float, dtype: torch.dtype
    ) -> PackContext:
        """Context of the slots whose RoPE positions are ``position_ids`` [s]."""
        # Both halves of a row are equal; the angles are made in fp32 and rounded once.
        cos, sin = (table[:, None, None, : head_dim // 2].to(dtype) for table in rotary_table(position_ids, head_dim, theta))
        return cls(n_und, n_gen, len(position_ids), cos, sin, attention)

    def split(self, hidden: torch.Tensor, first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Understanding and generation rows of ``hidden`` [rows, ...], which holds the slots from ``first`` on."""
        return self.split_rows(hidden, first, self.n_und, self.n_gen)

    @staticmethod
    def split_rows(hidden: torch.Tensor, first: int, n_und: int, n_gen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for given counts."""
        und = min(max(n_und - first, 0), hidden.shape[0])
        real = min(max(n_und + n_gen - first, 0), hidden.shape[0])
        # One split instead of two slices: its backward pass is one concatenation, not two padded copies and a sum.
        return hidden.split([und, real - und, hidden.shape[0] - real])[:2]
