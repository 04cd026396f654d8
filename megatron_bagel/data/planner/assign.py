# SPDX-License-Identifier: Apache-2.0
"""Assigns the packs of a global batch to data-parallel replicas so that no replica waits long for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bagel.common.assignment import longest_first


@dataclass(frozen=True)
class PackPlan:
    """One pack of the sequence: its ``number`` and the (source, sample index, epoch) of its samples; cost in decoder tokens."""

    number: int
    samples: tuple[tuple[int, int, int], ...]
    tokens: int
    cost: float


def assign_packs(packs: Sequence[PackPlan], replicas: int) -> list[list[PackPlan]]:
    """Assign a global batch to data-parallel replicas by the rule of ``pack_owners``. Inside a replica packs keep their canonical order.

    Raises:
        ValueError: If the number of replicas does not divide the number of packs.
    """
    in_order = sorted(packs, key=lambda pack: pack.number)
    owners = pack_owners(np.array([pack.cost for pack in in_order], dtype=np.float64), replicas).tolist()
    assigned: list[list[PackPlan]] = [[] for _ in range(replicas)]
    for pack, owner in zip(in_order, owners, strict=True):
        assigned[owner].append(pack)
    return assigned


def pack_owners(costs: np.ndarray, replicas: int) -> np.ndarray:
    """Return the replica of every pack of a global batch, int64 [packs]: equally many packs each, with costs balanced greedily.

    The most expensive pack goes first, each to the replica with the least work so far (Graham's longest-processing-time rule).

    Args:
        costs: Cost of every pack in canonical order, float64 [packs].
        replicas: The number of data-parallel replicas.

    Raises:
        ValueError: If the number of replicas does not divide the number of packs.
    """
    check_divides(len(costs), replicas)
    if len(costs) > replicas:
        return np.array(longest_first(costs.tolist(), replicas, room=len(costs) // replicas), dtype=np.int64)
    owners = np.empty(replicas, dtype=np.int64)
    owners[np.argsort(-costs, kind="stable")] = np.arange(replicas)  # with one pack each, the rule is a sort
    return owners


def check_divides(packs: int, replicas: int) -> None:
    """Raise ValueError if a global batch of ``packs`` packs cannot be divided evenly."""
    if replicas < 1 or packs % replicas:
        raise ValueError(
            f"a global batch of {packs} packs cannot be divided evenly among {replicas} data-parallel replicas; "
            "make --global_batch_size a multiple of the number of replicas"
        )
