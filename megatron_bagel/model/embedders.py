"""The small replicated modules that bring latents into and out of the decoder."""

from __future__ import annotations

import math

import torch
from torch import nn

FREQUENCIES = 256


class TimestepEmbedder(nn.Module):
    """t in [0, 1] -> [n, hidden]: sinusoid of 256 dimensions [cos | sin], f_i = exp(-ln(10000) i / 128), then Linear-SiLU-Linear.

    t is not multiplied by 1000.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    @staticmethod
    def sinusoid(t: torch.Tensor) -> torch.Tensor:
        """[n] -> [n, 256], fp32."""
        half = FREQUENCIES // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * steps / half)[None, :]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Tokens of one image share a timestep, so the MLP runs once per distinct value."""
        values, where = torch.unique(t, return_inverse=True)
        return self.mlp(self.sinusoid(values).to(self.mlp[0].weight.dtype))[where]
