# SPDX-License-Identifier: Apache-2.0
"""What replaces a broken sample: the next one of its dataset that fits, the same for whoever asks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.loading.replacement import replaced_plan
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from tests.data.planner.test_planner import Rows


@dataclass
class Halves(Rows):
    """Two datasets in one group."""

    def siblings(self, index: int) -> range:
        return range(self.size // 2) if index < self.size // 2 else range(self.size // 2, self.size)


LIMITS = PlannerConfig(100, 80, 60, 8)


@given(st.integers(8, 60), st.integers(0, 2**20), st.sets(st.integers(0, 30), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_the_next_that_fits_takes_the_place(size: int, seed: int, failed: set[int]) -> None:
    source = Halves("pictures", size)
    plan = Planner([source], PlannerConfig(100, 80, 60, 8, seed=seed)).packs(0, 1)[0]
    failed = {place for place in failed if place < len(plan.samples)}
    lengths = source.measure(np.arange(size), 0).tokens
    room = 100 - plan.tokens + min((int(lengths[plan.samples[place][1]]) for place in failed), default=0)
    if min(np.sort(lengths[: size // 2])[-1], np.sort(lengths[size // 2 :])[-1]) > room or len(plan.samples) > size // 2 - 1:
        return  # nothing may be left that fits
    new = replaced_plan(plan, failed, [source], LIMITS)
    assert new == replaced_plan(plan, sorted(failed, reverse=True), [source], LIMITS)
    assert new.tokens == sum(int(source.measure(np.array([i]), e).tokens[0]) for _, i, e in new.samples) <= 100
    assert len(set(new.samples)) == len(new.samples) == len(plan.samples)
    for place, (old, now) in enumerate(zip(plan.samples, new.samples, strict=True)):
        assert (old != now) == (place in failed)
        assert now[1] in source.siblings(old[1]) and now[2] == old[2]


def test_a_dataset_without_another_sample() -> None:
    """The pack goes without, as long as something is left of it."""
    source = Halves("pictures", 2)
    plan = Planner([source], LIMITS).packs(0, 1)[0]
    assert len(plan.samples) > 1
    left = replaced_plan(plan, [0], [source], LIMITS)
    assert left.samples == plan.samples[1:] and left.tokens < plan.tokens
    with pytest.raises(ValueError, match="parquet row .* no other sample"):
        replaced_plan(plan, range(len(plan.samples)), [source], LIMITS)
