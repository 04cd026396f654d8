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


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` [tokens, ..., head_dim] by ``cos`` and ``sin`` [tokens, head_dim]; dtype of ``x``."""
    shape = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cos.view(shape).to(x.dtype) + turned * sin.view(shape).to(x.dtype)
