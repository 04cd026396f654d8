# SPDX-License-Identifier: Apache-2.0
"""The rotary tables of a vision tower with 2-D rotary positions, as the original's module keeps them among its buffers.

They hold no information; the original's strict loading asks for them.
"""

from __future__ import annotations

import torch

from megatron_bagel.checkpoint.hf.weight_map import Table

_THETA = 10000.0


def rotary_table(table: Table) -> torch.Tensor:
    """Return ``table``, fp32 [side * side, width]: cosine or sine of the angles by row ("h") or column ("w"), twice side by side."""
    frequencies = 1.0 / _THETA ** (torch.arange(0, table.width, 2, dtype=torch.int64).float() / table.width)
    function, axis = table.rotary.split("_")
    positions = torch.arange(table.side).float()
    positions = positions.repeat_interleave(table.side) if axis == "h" else positions.repeat(table.side)
    angles = positions[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=1)
    return angles.cos() if function == "cos" else angles.sin()
