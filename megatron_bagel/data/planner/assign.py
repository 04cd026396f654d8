# SPDX-License-Identifier: Apache-2.0
"""Assigns the packs of a global batch to data-parallel replicas so that no replica waits long for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_bagel.common.assignment import longest_first


@dataclass(frozen=True)
class PackPlan:
    """One pack of the sequence: its ``number`` and the (source, sample index, epoch) of its samples; cost in decoder tokens."""

    number: int
    samples: tuple[tuple[int, int, int], ...]
    tokens: int
    cost: float


def assign_packs(packs: Sequence[PackPlan], replicas: int) -> list[list[PackPlan]]:
    """Assign a global batch to data-parallel replicas: equally many packs each, with costs balanced greedily.

    The most expensive pack goes first, each to the replica with the least work so far (Graham's longest-processing-time rule). Inside a
    replica packs keep their canonical order.

    Raises:
        ValueError: If the number of replicas does not divide the number of packs.
    """
    if replicas < 1 or len(packs) % replicas:
        raise ValueError(
            f"a global batch of {len(packs)} packs cannot be divided evenly among {replicas} data-parallel replicas; "
            "make --global_batch_size a multiple of the number of replicas"
        )
    in_order = sorted(packs, key=lambda pack: pack.number)
    owners = longest_first([pack.cost for pack in in_order], replicas, room=len(packs) // replicas)
    assigned: list[list[PackPlan]] = [[] for _ in range(replicas)]
    for pack, owner in zip(in_order, owners, strict=True):
        assigned[owner].append(pack)
    return assigned
