"""Packs of a global batch, dealt to data-parallel replicas so that none waits long for another."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackPlan:
    """One pack of the sequence: its ``number`` and the (source, sample index, epoch) of its samples; cost in decoder tokens."""

    number: int
    samples: tuple[tuple[int, int, int], ...]
    tokens: int
    cost: float


def assign_packs(packs: Sequence[PackPlan], replicas: int) -> list[list[PackPlan]]:
    """Deal a global batch to data-parallel replicas: equally many packs each, costs as equal as a greedy deal makes them.

    The costliest pack goes first, each to the replica with the least work so far (Graham's longest-processing-time rule); inside
    a replica packs keep their canonical order. Raises ValueError when the packs cannot be shared out evenly.
    """
    if replicas < 1 or len(packs) % replicas:
        raise ValueError(
            f"a global batch of {len(packs)} packs cannot be dealt evenly to {replicas} data-parallel replicas; "
            "make --global_batch_size a multiple of the number of replicas"
        )
    each = len(packs) // replicas
    hands: list[list[PackPlan]] = [[] for _ in range(replicas)]
    # Replicas with room, least work first.
    lightest = [(0.0, replica) for replica in range(replicas)]
    for pack in sorted(packs, key=lambda pack: (-pack.cost, pack.number)):
        work, replica = heapq.heappop(lightest)
        hands[replica].append(pack)
        if len(hands[replica]) < each:
            heapq.heappush(lightest, (work + pack.cost, replica))
    return [sorted(hand, key=lambda pack: pack.number) for hand in hands]
