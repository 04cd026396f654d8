# SPDX-License-Identifier: Apache-2.0
"""The two-layer MLP that maps ViT features to the decoder's width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Connector(nn.Module):
    """Map [n, in_dim] to [n, out_dim]: Linear, tanh-GELU, Linear."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_dim, out_dim)
        self.fc2 = nn.Linear(out_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map features [n, in_dim] to [n, out_dim]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
