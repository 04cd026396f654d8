# SPDX-License-Identifier: Apache-2.0
"""Fills one pack: samples in stream order as long as they fit, then the pair of waiting samples that fills the gap best.

Stream order keeps packs an unbiased mix; only the last few samples of a pack are chosen by length. A window of w waiting samples offers
w^2 / 2 pairs, so the gap left is a few tokens.
"""

from __future__ import annotations

import numpy as np

_PASSES = 8  # samples that may be skipped as too long before the pack is filled by best fit


def fill(tokens: np.ndarray, capacity: int, target: int) -> np.ndarray:
    """Choose which of the waiting samples go into a pack.

    Samples are chosen in order while their sum stays within ``target``, skipping single ones that do not fit. Then best fit fills the
    pack up to ``capacity``.

    Args:
        tokens: Lengths of the waiting samples, oldest first, int64 [w] (all > 0).
        capacity: The most tokens of the pack.
        target: The most tokens that stream order may fill.

    Returns:
        Indexes into ``tokens``, in the order chosen.
    """
    pack_indexes = _in_order(tokens, min(target, capacity))
    room = capacity - int(tokens[pack_indexes].sum())
    is_waiting = np.ones(len(tokens), dtype=bool)
    is_waiting[pack_indexes] = False
    remaining = np.flatnonzero(is_waiting)
    while len(remaining) and room > 0:
        pair = best_pair(tokens[remaining], room)
        if not len(pair):
            break
        pack_indexes = np.append(pack_indexes, remaining[pair])
        room -= int(tokens[remaining[pair]].sum())
        remaining = np.delete(remaining, pair)
    return pack_indexes


def _in_order(tokens: np.ndarray, target: int) -> np.ndarray:
    """Return the indexes of the samples that stream order puts into ``target`` tokens."""
    runs: list[np.ndarray] = []
    begin, room = 0, target
    for _ in range(_PASSES):
        count = int(np.searchsorted(np.cumsum(tokens[begin:]), room, side="right"))
        runs.append(np.arange(begin, begin + count))
        room -= int(tokens[begin : begin + count].sum())
        begin += count + 1
        if begin >= len(tokens):
            break
    return np.concatenate(runs)


def best_pair(tokens: np.ndarray, room: int) -> np.ndarray:
    """Return the indexes of the one or two samples whose lengths sum closest to ``room`` from below; empty if none fits.

    Among equal sums a single sample wins, then the oldest.
    """
    order = np.argsort(tokens, kind="stable")
    sizes = tokens[order]
    fitting = int(np.searchsorted(sizes, room, side="right"))
    if not fitting:
        return np.empty(0, dtype=np.int64)
    single = int(sizes[fitting - 1])
    # The partner of each sample is the longest other one that still fits, further left in the sorted order.
    partner = np.searchsorted(sizes[:fitting], room - sizes[:fitting], side="right") - 1
    partner = np.minimum(partner, np.arange(fitting) - 1)
    sums = np.where(partner >= 0, sizes[:fitting] + sizes[np.maximum(partner, 0)], 0)
    best = int(np.argmax(sums))
    if sums[best] > single:
        pair = _oldest(sizes, order, int(sizes[best])), _oldest(sizes, order, int(sizes[partner[best]]))
        if pair[0] == pair[1]:
            first_of_size = int(np.searchsorted(sizes, sizes[best], side="left"))
            return np.array([order[first_of_size], order[first_of_size + 1]])
        return np.array(pair)
    return np.array([_oldest(sizes, order, single)])


def _oldest(sizes: np.ndarray, order: np.ndarray, size: int) -> int:
    """Return the index of the first sample of this length; the stable sort keeps equal lengths in order of age."""
    return int(order[np.searchsorted(sizes, size, side="left")])
