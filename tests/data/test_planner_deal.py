"""Dealing packs: equally many each, every pack once, work as equal as the costliest pack allows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.planner_deal import PackPlan, deal


@given(st.lists(st.floats(0.5, 50), min_size=1, max_size=12), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_deal_is_even_and_complete(costs: list[float], replicas: int) -> None:
    packs = [PackPlan(number, (), 1, cost) for number, cost in enumerate(costs * replicas)]
    hands = deal(packs, replicas)
    assert [len(hand) for hand in hands] == [len(costs)] * replicas
    assert sorted(pack.number for hand in hands for pack in hand) == list(range(len(packs)))
    work = [sum(pack.cost for pack in hand) for hand in hands]
    assert max(work) - min(work) <= max(costs) + 1e-9


def test_uneven_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="3 packs cannot be dealt evenly to 2"):
        deal([PackPlan(i, (), 1, 1.0) for i in range(3)], 2)
