"""The fixed two-dimensional position table added to image tokens; computed here, never trained."""

from __future__ import annotations

import numpy as np
import torch


def sincos_2d(dim: int, side: int) -> torch.Tensor:
    """Table fp32 [side * side, dim], row-major over (row, column).

    The first half of the channels encodes the column, the second the row; each half is [sin(pos w), cos(pos w)] with
    w_i = 10000 ** (-i / (dim / 4)), computed in float64 as the original does. Raises ValueError when 4 does not divide ``dim``.
    """
    if dim % 4:
        raise ValueError(f"a two-dimensional sin-cos table needs a hidden size that 4 divides, got {dim}")
    omega = 10000.0 ** -(np.arange(dim // 4, dtype=np.float64) / (dim // 4))
    angles = np.arange(side, dtype=np.float64)[:, None] * omega[None, :]
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(axis, (side, 1)), np.repeat(axis, side, axis=0)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1)).float()
