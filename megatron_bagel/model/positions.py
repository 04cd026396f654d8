# SPDX-License-Identifier: Apache-2.0
"""The fixed 2-D sin-cos table that tells the decoder where in its image a ViT or latent token lies."""

from __future__ import annotations

import numpy as np
import torch


def sincos_2d(dim: int, side: int) -> torch.Tensor:
    """Return the position table of a ``side`` x ``side`` grid in (row, column) order, float32 [side * side, dim].

    The first half of the channels encodes the column, the second half the row. A half of width d is [sin(p * w), cos(p * w)]
    with w_i = 10000 ** (-i / (d / 2)) for i = 0 .. d / 2 - 1, the transformer's frequencies. They are computed in float64 and
    then rounded, like the tables in the released checkpoints.

    Raises:
        ValueError: If ``dim`` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"2-D position table: hidden size {dim} is not a multiple of 4 (sine and cosine of row and column)")
    quarter = dim // 4
    frequencies = 1.0 / 10000.0 ** (np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.arange(side, dtype=np.float64)[:, None] * frequencies
    axis_table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    by_column = np.tile(axis_table, (side, 1))
    by_row = np.repeat(axis_table, side, axis=0)
    return torch.from_numpy(np.concatenate([by_column, by_row], axis=1).astype(np.float32))
