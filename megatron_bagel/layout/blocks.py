# SPDX-License-Identifier: Apache-2.0
"""Which 128 x 128 blocks of the attention matrix are occupied, computed from the segments without any [s, s] array.

The rank's slots are cut into pieces. A piece lies inside one block and one split and runs through consecutive positions.
Between two pieces the mask is full, empty or a triangle, which follows from their first and last positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder


@dataclass(frozen=True)
class BlockOccupancy:
    """Boolean [blocks, blocks]: ``occupied`` if a block allows any pair, ``full_blocks`` if all. ``block`` is its side in tokens."""

    occupied: np.ndarray
    full_blocks: np.ndarray
    block: int


@dataclass(frozen=True)
class _Pieces:
    """Runs of slots: first position and length, and their sample, split, mode and block."""

    first_position: np.ndarray
    size: np.ndarray
    sample: np.ndarray
    split: np.ndarray
    mode: np.ndarray
    block: np.ndarray


def _pieces(mask: PackMask, positions: np.ndarray, block: int) -> _Pieces:
    slots = np.arange(len(positions))
    split, sample = mask.token_splits()[positions], mask.token_samples()[positions]
    is_start = np.ones(len(positions), dtype=bool)
    is_start[1:] = (np.diff(positions) != 1) | (np.diff(split) != 0) | (np.diff(slots // block) != 0)
    start = np.flatnonzero(is_start)
    size = np.diff(np.append(start, len(positions)))
    return _Pieces(positions[start], size, sample[start], split[start], mask.split_modes[split[start]], start // block)


def block_occupancy(mask: PackMask, queries: TokenOrder, keys: TokenOrder | None = None, block: int = 128) -> BlockOccupancy:
    """Return which blocks between a rank's query slots and the key slots (default: the same slots) are occupied.

    Padding slots see nothing and nothing sees them, so a block that reaches into padding is never full.
    """
    keys = queries if keys is None else keys
    q, k = _pieces(mask, queries.positions, block), _pieces(mask, keys.positions, block)
    same_split = q.split[:, None] == k.split[None, :]
    visible = (q.sample[:, None] == k.sample[None, :]) & ((k.mode != Mode.NOISE)[None, :] | same_split)
    both_ways = same_split & (k.mode != Mode.CAUSAL)[None, :]
    q_last_position, k_last_position = q.first_position + q.size - 1, k.first_position + k.size - 1
    occupied = visible & (both_ways | (k.first_position[None, :] <= q_last_position[:, None]))
    filled = visible & (both_ways | (k_last_position[None, :] <= q.first_position[:, None]))
    filled_pairs = filled * (q.size[:, None] * k.size[None, :])
    q_start, k_start = (np.flatnonzero(np.r_[True, np.diff(p.block) > 0]) for p in (q, k))
    shape = tuple(-(-order.length // block) for order in (queries, keys))
    occupied_blocks = np.zeros(shape, dtype=bool)
    allowed_pairs = np.zeros(shape, dtype=np.int64)
    if len(q.first_position) and len(k.first_position):
        corner = (len(q_start), len(k_start))
        occupied_blocks[: corner[0], : corner[1]] = np.logical_or.reduceat(np.logical_or.reduceat(occupied, q_start, 0), k_start, 1)
        allowed_pairs[: corner[0], : corner[1]] = np.add.reduceat(np.add.reduceat(filled_pairs, q_start, 0), k_start, 1)
    return BlockOccupancy(occupied_blocks, allowed_pairs == block * block, block)
