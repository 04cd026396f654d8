# SPDX-License-Identifier: Apache-2.0
"""The small replicated modules that embed latents for the decoder."""

from __future__ import annotations

import math
from functools import lru_cache

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
        angles = t.float()[:, None] * _frequencies(t.device)[None, :]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Embed timesteps."""
        return self.mlp(self.sinusoid(t).to(self.mlp.get_parameter("0.weight").dtype))


@lru_cache(maxsize=16)
def _frequencies(device: torch.device) -> torch.Tensor:
    """Return the frequencies of the sinusoid, fp32 [128]; kept, because a copy to a GPU would make the host wait.

    They are computed on the CPU, as in the original: another device's exponential rounds differently.
    """
    half = FREQUENCIES // 2
    steps = torch.arange(half, dtype=torch.float32, device="cpu")
    return torch.exp(-math.log(10000.0) * steps / half).to(device)
