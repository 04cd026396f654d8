"""Cutting a full tensor for one tensor-parallel rank, without any process group.

Megatron stores a fused `[gate; up]` projection as `[gate_r; up_r]` on rank r: it is cut inside each of its `blocks`, not as a whole.
Fused QKV is grouped by key/value head (see weight_map.py), so it is cut as a whole.
"""

from __future__ import annotations

import torch


def take_shard(full: torch.Tensor, dim: int, rank: int, size: int, blocks: int = 1) -> torch.Tensor:
    """The part of `full` that tensor-parallel `rank` of `size` holds, a view of it where it is one piece.

    `dim` is the partitioned dimension (-1: replicated, `full` is returned), `blocks` the number of fused projections along it.
    Raises ValueError if the dimension cannot be cut evenly.
    """
    if dim < 0 or size == 1:
        return full
    length = full.shape[dim]
    if length % (size * blocks):
        raise ValueError(
            f"a tensor of shape {tuple(full.shape)} cannot be cut into {size} tensor-parallel shards of {blocks} block(s) along "
            f"dimension {dim}; choose a --tensor-model-parallel-size that divides {length // blocks}"
        )
    pieces = [block.chunk(size, dim)[rank] for block in full.chunk(blocks, dim)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
