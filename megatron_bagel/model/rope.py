# SPDX-License-Identifier: Apache-2.0
"""Rotary positions for packed tokens in any order: angles are looked up once per step, not once per layer."""

from __future__ import annotations

from functools import lru_cache

import torch


def rotary_table(position_ids: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosine and sine tables of the rotary angles, both fp32 [tokens, head_dim], in the half-split convention.

    The angle of channel i is position * theta ** (-2 i / head_dim). Frequencies stay fp32 in every training dtype; the
    original rounds them to bf16 while training. They are computed on the CPU, as in the original: another device's power function
    rounds differently, and a position of thousands multiplies the difference.
    """
    angles = position_ids.float()[:, None] * _frequencies(head_dim, theta, position_ids.device)[None, :]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@lru_cache(maxsize=16)
def _frequencies(head_dim: int, theta: float, device: torch.device) -> torch.Tensor:
    """Return the frequency of each pair of channels, fp32 [head_dim / 2]; kept, because a copy to a GPU would make the host wait."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    return (1.0 / theta**exponent).to(device)
