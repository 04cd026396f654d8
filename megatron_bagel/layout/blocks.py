"""Which 128 x 128 blocks of the attention matrix hold anything, from the segments alone: no [s, s] array is ever made.

The rank's slots are cut into pieces that lie inside one block and one split and run through consecutive positions. Between
two pieces the mask is all, nothing, or a triangle, which a comparison of their ends decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder


@dataclass(frozen=True)
class BlockOccupancy:
    """Boolean [blocks, blocks]: ``some`` pairs are allowed, ``full`` if all are. ``block`` is the side in tokens."""

    some: np.ndarray
    full: np.ndarray
    block: int


@dataclass(frozen=True)
class _Pieces:
    """Runs of slots: first position, length, and their sample, split, mode and block."""

    first: np.ndarray
    size: np.ndarray
    sample: np.ndarray
    split: np.ndarray
    mode: np.ndarray
    block: np.ndarray


def _pieces(mask: PackMask, positions: np.ndarray, block: int) -> _Pieces:
    slots = np.arange(len(positions))
    split, sample = mask.token_splits()[positions], mask.token_samples()[positions]
    new = np.ones(len(positions), dtype=bool)
    new[1:] = (np.diff(positions) != 1) | (np.diff(split) != 0) | (np.diff(slots // block) != 0)
    start = np.flatnonzero(new)
    size = np.diff(np.append(start, len(positions)))
    return _Pieces(positions[start], size, sample[start], split[start], mask.split_modes[split[start]], start // block)


def block_occupancy(mask: PackMask, queries: TokenOrder, keys: TokenOrder | None = None, block: int = 128) -> BlockOccupancy:
    """Occupancy of the blocks between a rank's query slots and the key slots (its own unless given).

    Padding slots see nothing and are seen by nothing; a block that reaches into padding is never full.
    """
    keys = queries if keys is None else keys
    q, k = _pieces(mask, queries.positions, block), _pieces(mask, keys.positions, block)
    same_split = q.split[:, None] == k.split[None, :]
    visible = (q.sample[:, None] == k.sample[None, :]) & ((k.mode != Mode.NOISE)[None, :] | same_split)
    both_ways = same_split & (k.mode != Mode.CAUSAL)[None, :]
    q_last, k_last = q.first + q.size - 1, k.first + k.size - 1
    some = visible & (both_ways | (k.first[None, :] <= q_last[:, None]))
    every = visible & (both_ways | (k_last[None, :] <= q.first[:, None]))
    pairs = every * (q.size[:, None] * k.size[None, :])
    q_start, k_start = (np.flatnonzero(np.r_[True, np.diff(p.block) > 0]) for p in (q, k))
    shape = tuple(-(-order.length // block) for order in (queries, keys))
    found = np.zeros(shape, dtype=bool)
    whole = np.zeros(shape, dtype=np.int64)
    if len(q.first) and len(k.first):
        corner = (len(q_start), len(k_start))
        found[: corner[0], : corner[1]] = np.logical_or.reduceat(np.logical_or.reduceat(some, q_start, 0), k_start, 1)
        whole[: corner[0], : corner[1]] = np.add.reduceat(np.add.reduceat(pairs, q_start, 0), k_start, 1)
    return BlockOccupancy(found, whole == block * block, block)
