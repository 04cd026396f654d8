# SPDX-License-Identifier: Apache-2.0
"""Dealing packs: equally many each, every pack once, work as equal as the costliest pack allows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.planner.assign import PackPlan, assign_packs


@given(st.lists(st.floats(0.5, 50), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_deal_is_even_and_complete(costs: list[float], replicas: int) -> None:
    packs = [PackPlan(number, (), 1, cost) for number, cost in enumerate(costs * replicas)]
    hands = assign_packs(packs, replicas)
    assert [len(hand) for hand in hands] == [len(costs)] * replicas
    assert sorted(pack.number for hand in hands for pack in hand) == list(range(len(packs)))
    work = [sum(pack.cost for pack in hand) for hand in hands]
    assert max(work) - min(work) <= max(costs) + 1e-9


def test_a_large_batch_is_dealt_as_a_search_of_all_replicas_would() -> None:
    """The costliest pack first, to the replica with room and the least work; ties to the lowest."""
    random = np.random.default_rng(0)
    packs = [PackPlan(number, (), 1, float(cost)) for number, cost in enumerate(random.integers(1, 9, 96))]
    hands: list[list[PackPlan]] = [[] for _ in range(12)]
    for pack in sorted(packs, key=lambda pack: (-pack.cost, pack.number)):
        room = [hand for hand in hands if len(hand) < 8]
        min(room, key=lambda hand: sum(held.cost for held in hand)).append(pack)
    assert assign_packs(packs, 12) == [sorted(hand, key=lambda pack: pack.number) for hand in hands]


def test_uneven_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="3 packs cannot be divided evenly among 2"):
        assign_packs([PackPlan(i, (), 1, 1.0) for i in range(3)], 2)
