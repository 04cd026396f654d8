"""Filling one pack: stream order as far as it goes, then the pair of waiting samples that closes the gap most tightly.

Stream order keeps packs an unbiased mix; only the last few samples of a pack are chosen by length. With a window of w waiting
samples there are w^2 / 2 pairs to choose from, so the gap left is a few tokens.
"""

from __future__ import annotations

import numpy as np

_PASSES = 8  # how many samples too long for the rest of a pack are stepped over before closing begins


def fill(tokens: np.ndarray, capacity: int, target: int) -> np.ndarray:
    """Which of the waiting samples go into a pack, as indexes into ``tokens`` in the order chosen.

    ``tokens`` [w] int64 (all > 0) lists the waiting samples' lengths, oldest first. They are taken in this order while their sum
    stays within ``target`` (stepping over single ones that do not fit), then best fit closes the pack up to ``capacity``.
    """
    taken = _in_order(tokens, min(target, capacity))
    room = capacity - int(tokens[taken].sum())
    waiting = np.ones(len(tokens), dtype=bool)
    waiting[taken] = False
    rest = np.flatnonzero(waiting)
    while len(rest) and room > 0:
        chosen = best_pair(tokens[rest], room)
        if not len(chosen):
            break
        taken = np.append(taken, rest[chosen])
        room -= int(tokens[rest[chosen]].sum())
        rest = np.delete(rest, chosen)
    return taken


def _in_order(tokens: np.ndarray, target: int) -> np.ndarray:
    """Indexes of the samples that stream order puts into ``target`` tokens."""
    taken: list[np.ndarray] = []
    begin, room = 0, target
    for _ in range(_PASSES):
        count = int(np.searchsorted(np.cumsum(tokens[begin:]), room, side="right"))
        taken.append(np.arange(begin, begin + count))
        room -= int(tokens[begin : begin + count].sum())
        begin += count + 1
        if begin >= len(tokens):
            break
    return np.concatenate(taken)


def best_pair(tokens: np.ndarray, room: int) -> np.ndarray:
    """Indexes of the one or two samples whose lengths sum closest to ``room`` from below; empty when none fits.

    Among equals a single sample wins, then the oldest.
    """
    order = np.argsort(tokens, kind="stable")
    sizes = tokens[order]
    fitting = int(np.searchsorted(sizes, room, side="right"))
    if not fitting:
        return np.empty(0, dtype=np.int64)
    single = int(sizes[fitting - 1])
    # The partner of each sample: the longest other one, further left in the sorted order, that still fits.
    partner = np.searchsorted(sizes[:fitting], room - sizes[:fitting], side="right") - 1
    partner = np.minimum(partner, np.arange(fitting) - 1)
    sums = np.where(partner >= 0, sizes[:fitting] + sizes[np.maximum(partner, 0)], 0)
    best = int(np.argmax(sums))
    if sums[best] > single:
        pair = _oldest(sizes, order, int(sizes[best])), _oldest(sizes, order, int(sizes[partner[best]]))
        if pair[0] == pair[1]:
            first = int(np.searchsorted(sizes, sizes[best], side="left"))
            return np.array([order[first], order[first + 1]])
        return np.array(pair)
    return np.array([_oldest(sizes, order, single)])


def _oldest(sizes: np.ndarray, order: np.ndarray, size: int) -> int:
    """Index of the first sample of this length: the stable sort kept equal lengths in order of age."""
    return int(order[np.searchsorted(sizes, size, side="left")])
