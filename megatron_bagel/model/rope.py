"""Rotary positions for packed tokens in any order: angles are looked up once per step, not once per layer."""

from __future__ import annotations

import torch


def rotary_table(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [tokens, head_dim], of angles position * theta ** (-2 i / head_dim); half-split convention.

    Frequencies stay fp32 whatever the training dtype (the original rounds them to bf16 while training).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=position_ids.device).float() / head_dim
    angles = position_ids.float()[:, None] * (1.0 / theta**exponent)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()
