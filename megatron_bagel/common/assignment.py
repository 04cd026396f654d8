# SPDX-License-Identifier: Apache-2.0
"""Longest-first assignment: the balance rule that averages, image encoding and packs share."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def longest_first(loads: Sequence[float], bins: int, room: int | None = None) -> list[int]:
    """Return the bin of every item: the largest item goes first, each to the least loaded bin (Graham's LPT rule).

    Ties go to the earlier item and the lower bin, so every rank that calls this gets the same answer.

    Args:
        loads: Cost of each item, 0 or more.
        bins: How many bins there are.
        room: How many items a bin takes at most; without it any number.
    """
    heap = [(0.0, number) for number in range(bins)]  # a search of all bins for every item takes seconds with thousands of them
    owners, counts = [0] * len(loads), [0] * bins
    for index in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        load, owner = heapq.heappop(heap)
        owners[index] = owner
        counts[owner] += 1
        if counts[owner] != room:
            heapq.heappush(heap, (load + loads[index], owner))
    return owners
