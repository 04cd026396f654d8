"""Many packs at once, each full and each costing the same: what lets a step with one pack per replica start and end together.

Samples that cost more than their tokens say (long documents, large images) are dealt first, so that every pack gets its share of them;
short ones then level the tokens, and best fit closes what is left. Dealing is the longest-processing-time rule (Graham, 1969) with a
heap, linear in the samples up to a logarithm: ten million samples are packed in seconds.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

_HEAVY = 0.002  # work beyond the tokens' own, as a share of a pack's tokens, from which a sample counts as heavy
_TRIES = 8  # packs tried for a heavy sample, before it waits for the closing
_WASTE = 0.002  # gap, as a share of a pack, that is worth the search for a pair
_PAIRS = 512  # pairs looked at, at most: one of the first mostly fits to the token


@dataclass(frozen=True)
class Load:
    """What samples, or packs, weigh: ``tokens`` and ``excess`` [n] int64, the work beyond the tokens' own in the same unit."""

    tokens: np.ndarray
    excess: np.ndarray


class BlockPacking:
    """Packs under construction, called in the order of the methods."""

    def __init__(self, samples: Load, begun: Load, capacity: int) -> None:
        """``begun`` is what every pack holds already (its mandatory samples)."""
        self.capacity = capacity
        self._samples = samples
        self._pack_of = [-1] * len(samples.tokens)
        self._tokens, self._excess = begun.tokens.tolist(), begun.excess.tolist()

    @property
    def pack_of(self) -> np.ndarray:
        """Each sample's pack, or -1 for those that wait, int64 [n]."""
        return np.array(self._pack_of, dtype=np.int64)

    def place_first(self, chosen: np.ndarray) -> None:
        """Samples that must not wait any longer: longest first, each into the emptiest pack, where it fits."""
        self._level(chosen)
        for sample in chosen.tolist():
            if self._pack_of[sample] >= 0:
                self._excess[self._pack_of[sample]] += int(self._samples.excess[sample])

    def assign_due(self, due: np.ndarray) -> None:
        """Deal the waiting ones of ``due`` (indexes), heavy ones by their work, the others by their tokens."""
        due = due[self.pack_of[due] < 0]
        heavy = self._samples.excess[due] > _HEAVY * self.capacity
        self._deal_heavy(due[heavy])
        self._level(due[~heavy])

    def close(self) -> None:
        """Fill every pack up with the waiting samples that fit best; the emptiest packs choose first."""
        waiting = np.flatnonzero(self.pack_of < 0)
        order = waiting[np.argsort(self._samples.tokens[waiting], kind="stable")]
        sizes, samples = self._samples.tokens[order].tolist(), order.tolist()
        for pack in np.argsort(self._tokens, kind="stable").tolist():
            self._close_pack(pack, sizes, samples)

    def _deal_heavy(self, chosen: np.ndarray) -> None:
        chosen = chosen[np.argsort(-self._samples.excess[chosen], kind="stable")]
        tokens, pack_of, capacity, count = self._tokens, self._pack_of, self.capacity, len(self._excess)
        weights = (chosen, self._samples.tokens[chosen], self._samples.excess[chosen] * count)
        heap = [load * count + pack for pack, load in enumerate(self._excess)]  # as in `_level`
        heapq.heapify(heap)
        most = min(_TRIES, count) - 1
        for sample, length, work in zip(*(column.tolist() for column in weights), strict=True):
            entry = heap[0]
            pack = entry % count
            if (held := tokens[pack] + length) <= capacity:
                heapq.heapreplace(heap, entry + work)
                pack_of[sample], tokens[pack] = pack, held
                continue
            passed = []
            while len(passed) < most and tokens[pack] + length > capacity:
                passed.append(heapq.heappop(heap))
                pack = heap[0] % count
            if tokens[pack] + length <= capacity:
                heapq.heapreplace(heap, heap[0] + work)
                pack_of[sample] = pack
                tokens[pack] += length
            for entry in passed:
                heapq.heappush(heap, entry)

    def _level(self, chosen: np.ndarray) -> None:
        """Longest first, each into the emptiest pack; what does not fit there fits nowhere and waits."""
        tokens = self._samples.tokens[chosen]
        order = np.argsort(-tokens, kind="stable")
        count, pack_of, capacity = len(self._tokens), self._pack_of, self.capacity
        # One integer per pack, load * count + pack, is twice as fast to compare as a pair.
        heap = [load * count + pack for pack, load in enumerate(self._tokens)]
        heapq.heapify(heap)
        weights = chosen[order], tokens[order] * count, (capacity - tokens[order] + 1) * count
        for sample, length, limit in zip(*(column.tolist() for column in weights), strict=True):
            emptiest = heap[0]
            if emptiest < limit:
                heapq.heapreplace(heap, emptiest + length)
                pack_of[sample] = emptiest % count
        for load, pack in (divmod(entry, count) for entry in heap):
            self._tokens[pack] = load

    def _close_pack(self, pack: int, sizes: list[int], samples: list[int]) -> None:
        """``sizes`` ascending are the lengths of the waiting ``samples``; those taken are removed from both."""
        while (place := bisect_right(sizes, room := self.capacity - self._tokens[pack]) - 1) >= 0:
            taken = [place]
            if _WASTE * self.capacity < room - sizes[place] < sizes[0]:  # it would be the last one, and fits badly
                taken = closing_pair(sizes, room, room - sizes[place]) or taken
            for place in taken:
                self._put(samples.pop(place), sizes.pop(place), pack)

    def _put(self, sample: int, length: int, pack: int) -> None:
        self._pack_of[sample] = pack
        self._tokens[pack] += length


def closing_pair(sizes: list[int], room: int, gap: int) -> list[int]:
    """Places, the later first, of two samples that fill ``room`` tokens up to less than ``gap``; empty when none are found.

    ``sizes`` is ascending. Pairs of like size are tried first, up to an exact fit: the shortest samples stay for smaller gaps.
    """
    best: list[int] = []
    middle = max(bisect_right(sizes, room // 2) - 1, 1)
    for longer in range(middle, min(bisect_right(sizes, room - sizes[0]), middle + _PAIRS)):
        left = room - sizes[longer]
        shorter = min(bisect_right(sizes, left), longer) - 1
        if left - sizes[shorter] < gap:
            best, gap = [longer, shorter], left - sizes[shorter]
            if not gap:
                break
    return best
