"""Rotary positions for packed tokens in any order: angles are looked up once per step, not once per layer."""

from __future__ import annotations

import torch


def rotary_table(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine and sine tables of the rotary angles, both fp32 [tokens, head_dim], in the half-split convention.

    The angle of channel i is position * theta ** (-2 i / head_dim). Frequencies stay fp32 in every training dtype; the
    original rounds them to bf16 while training.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids.device).float() / head_dim
    angles = position_ids.float()[:, None] * (1.0 / theta**exponent)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
