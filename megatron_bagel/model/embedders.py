# SPDX-License-Identifier: Apache-2.0
"""The small replicated modules that embed latents for the decoder."""

from __future__ import annotations

import math

import torch
from torch import nn

FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """Embed n timesteps in [0, 1] as [n, hidden]: a sinusoid of 256 dimensions, then Linear, SiLU, Linear.

    The sinusoid is [cos | sin] with frequencies f_i = exp(-ln(10000) i / 128). Timesteps are not multiplied by 1000.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def sinusoid(t: torch.Tensor) -> torch.Tensor:
        """Return the sinusoid of timesteps [n], fp32 [n, 256]."""
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device="cpu")
        # Computed on the CPU, as in the original: another device's exponential rounds differently.
        frequencies = torch.exp(-math.log(10000.0) * steps / half).to(t.device)
        angles = t.float()[:, None] * frequencies[None, :]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed timesteps. Tokens of one image share a timestep, so the MLP runs once per distinct value."""
        values, value_of_token = torch.unique(t, return_inverse=True)
        return self.mlp(self.sinusoid(values).to(self.mlp.get_parameter("0.weight").dtype))[value_of_token]
