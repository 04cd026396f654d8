# SPDX-License-Identifier: Apache-2.0
"""Packs many samples into packs at once, all full and of equal cost, so that the replicas of a step start and end together.

Samples that cost more than their number of tokens (long documents, large images) are assigned first, so that every pack gets its share.
Short ones then level the tokens, and best fit fills the gaps. Assignment follows the longest-processing-time rule (Graham, 1969) with a
heap, linear in the samples up to a logarithm: ten million samples take seconds.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

_HEAVY_EXCESS = 0.002  # excess work, as a share of a pack's tokens, from which a sample counts as heavy
_MAX_TRIES = 8  # packs tried for a heavy sample before it waits for the closing
_MIN_GAP = 0.002  # gap, as a share of a pack, that justifies the search for a pair
_MAX_PAIRS = 512  # pairs examined at most; one of the first mostly fits to the token


@dataclass(frozen=True)
class Load:
    """Weights of samples or packs: ``tokens`` and ``excess`` [n] int64, the work beyond the number of tokens in the same unit."""

    tokens: np.ndarray
    excess: np.ndarray


class BlockPacking:
    """Packs under construction; call the methods in the order they are defined."""

    def __init__(self, samples: Load, mandatory: Load, capacity: int) -> None:
        """Start packs with the load ``mandatory`` of their mandatory samples."""
        self.capacity = capacity
        self._samples = samples
        self._pack_of = [-1] * len(samples.tokens)
        self._tokens, self._excess = mandatory.tokens.tolist(), mandatory.excess.tolist()

    @property
    def pack_of(self) -> np.ndarray:
        """Return each sample's pack, or -1 if it waits, int64 [n]."""
        return np.array(self._pack_of, dtype=np.int64)

    def assign_first(self, samples: np.ndarray) -> None:
        """Assign samples that must not wait any longer: longest first, each to the emptiest pack if it fits."""
        self._level(samples)
        for sample in samples.tolist():
            if self._pack_of[sample] >= 0:
                self._excess[self._pack_of[sample]] += int(self._samples.excess[sample])

    def assign_due(self, due: np.ndarray) -> None:
        """Assign the waiting samples of ``due`` (indexes), heavy ones by their work, the others by their tokens."""
        due = due[self.pack_of[due] < 0]
        heavy = self._samples.excess[due] > _HEAVY_EXCESS * self.capacity
        self._assign_heavy(due[heavy])
        self._level(due[~heavy])

    def close(self) -> None:
        """Fill every pack with the waiting samples that fit best; the emptiest packs choose first."""
        waiting = np.flatnonzero(self.pack_of < 0)
        order = waiting[np.argsort(self._samples.tokens[waiting], kind="stable")]
        sizes, samples = self._samples.tokens[order].tolist(), order.tolist()
        for pack in np.argsort(self._tokens, kind="stable").tolist():
            self._close_pack(pack, sizes, samples)

    def _assign_heavy(self, samples: np.ndarray) -> None:
        samples = samples[np.argsort(-self._samples.excess[samples], kind="stable")]
        tokens, pack_of, capacity, count = self._tokens, self._pack_of, self.capacity, len(self._excess)
        weights = (samples, self._samples.tokens[samples], self._samples.excess[samples] * count)
        heap = [load * count + pack for pack, load in enumerate(self._excess)]  # as in ``_level``
        heapq.heapify(heap)
        max_passed = min(_MAX_TRIES, count) - 1
        for sample, length, work in zip(*(column.tolist() for column in weights), strict=True):
            entry = heap[0]
            pack = entry % count
            if (new_tokens := tokens[pack] + length) <= capacity:
                heapq.heapreplace(heap, entry + work)
                pack_of[sample], tokens[pack] = pack, new_tokens
                continue
            passed: list[int] = []
            while len(passed) < max_passed and tokens[pack] + length > capacity:
                passed.append(heapq.heappop(heap))
                pack = heap[0] % count
            if tokens[pack] + length <= capacity:
                heapq.heapreplace(heap, heap[0] + work)
                pack_of[sample] = pack
                tokens[pack] += length
            for entry in passed:
                heapq.heappush(heap, entry)

    def _level(self, samples: np.ndarray) -> None:
        """Assign samples, longest first, each to the emptiest pack. A sample that does not fit there fits nowhere and waits."""
        tokens = self._samples.tokens[samples]
        order = np.argsort(-tokens, kind="stable")
        count, pack_of, capacity = len(self._tokens), self._pack_of, self.capacity
        # One integer per pack, load * count + pack, is twice as fast to compare as a pair.
        heap = [load * count + pack for pack, load in enumerate(self._tokens)]
        heapq.heapify(heap)
        weights = samples[order], tokens[order] * count, (capacity - tokens[order] + 1) * count
        for sample, length, limit in zip(*(column.tolist() for column in weights), strict=True):
            emptiest = heap[0]
            if emptiest < limit:
                heapq.heapreplace(heap, emptiest + length)
                pack_of[sample] = emptiest % count
        for load, pack in (divmod(entry, count) for entry in heap):
            self._tokens[pack] = load

    def _close_pack(self, pack: int, sizes: list[int], samples: list[int]) -> None:
        """Fill one pack. ``sizes`` ascending are the lengths of the waiting ``samples``; chosen ones are removed from both."""
        while (position := bisect_right(sizes, room := self.capacity - self._tokens[pack]) - 1) >= 0:
            positions = [position]
            if _MIN_GAP * self.capacity < room - sizes[position] < sizes[0]:  # it would be the last one and leave a gap
                positions = closing_pair(sizes, room, room - sizes[position]) or positions
            for position in positions:
                self._add_sample(samples.pop(position), sizes.pop(position), pack)

    def _add_sample(self, sample: int, length: int, pack: int) -> None:
        self._pack_of[sample] = pack
        self._tokens[pack] += length


def closing_pair(sizes: list[int], room: int, gap: int) -> list[int]:
    """Return the positions, later first, of two samples that fill ``room`` tokens up to less than ``gap``; empty if there are none.

    ``sizes`` is ascending. Pairs of similar size come first, until one fits exactly, so that the shortest samples stay for smaller gaps.
    """
    best_pair: list[int] = []
    middle = max(bisect_right(sizes, room // 2) - 1, 1)
    for longer in range(middle, min(bisect_right(sizes, room - sizes[0]), middle + _MAX_PAIRS)):
        remaining = room - sizes[longer]
        shorter = min(bisect_right(sizes, remaining), longer) - 1
        if remaining - sizes[shorter] < gap:
            best_pair, gap = [longer, shorter], remaining - sizes[shorter]
            if not gap:
                break
    return best_pair
