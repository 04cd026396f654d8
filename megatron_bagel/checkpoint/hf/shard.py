# SPDX-License-Identifier: Apache-2.0
"""Slices a full tensor for one tensor-parallel rank, without any process group.

Megatron stores a fused ``[gate; up]`` projection as ``[gate_r; up_r]`` on rank r, so each of its ``blocks`` is sliced separately.
Fused QKV is ordered by key/value head (see weight_map.py), so it is sliced as one block.
"""

from __future__ import annotations

import torch


def take_shard(full: torch.Tensor, dim: int, rank: int, size: int, blocks: int = 1) -> torch.Tensor:
    """Return the part of ``full`` that tensor-parallel ``rank`` of ``size`` holds; a view if it is contiguous in ``full``.

    Args:
        full: The full tensor.
        dim: The partitioned dimension; -1 means replicated and returns ``full``.
        rank: The tensor-parallel rank.
        size: The number of tensor-parallel ranks.
        blocks: The number of fused projections along ``dim``.

    Raises:
        ValueError: If ``size * blocks`` does not divide the dimension.
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
