# SPDX-License-Identifier: Apache-2.0
"""Packing: never too full, no sample twice, the best pair really is the best, long waiting lists give full packs."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.planner.packing import best_pair, fill

LENGTHS = st.lists(st.integers(1, 60), max_size=14)


@given(LENGTHS, st.integers(1, 100))
@settings(max_examples=200, deadline=None)
def test_best_pair_is_best(lengths: list[int], room: int) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    chosen = best_pair(tokens, room)
    sums = [sum(c) for n in (1, 2) for c in itertools.combinations(lengths, n) if sum(c) <= room]
    assert len(set(chosen.tolist())) == len(chosen)
    assert int(tokens[chosen].sum()) == max(sums, default=0)


@given(LENGTHS, st.integers(1, 200), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_fill_respects_capacity_and_wastes_nothing(lengths: list[int], capacity: int, target: int) -> None:
    tokens = np.array(lengths, dtype=np.int64)
    taken = fill(tokens, capacity, target)
    assert len(set(taken.tolist())) == len(taken)
    used = int(tokens[taken].sum())
    assert used <= capacity
    left = np.delete(tokens, taken)
    assert not len(left) or used + left.min() > capacity


@given(LENGTHS.filter(len), st.integers(1, 200), st.integers(0, 200))
@settings(max_examples=100, deadline=None)
def test_the_oldest_goes_first_when_it_fits_the_target(lengths: list[int], capacity: int, target: int) -> None:
    taken = fill(np.array(lengths, dtype=np.int64), capacity, target)
    if lengths[0] <= min(capacity, target):
        assert taken[0] == 0


def test_windows_of_mixed_lengths_fill_packs() -> None:
    rng = np.random.default_rng(0)
    fills = []
    for _ in range(50):
        tokens = np.clip(np.exp(rng.normal(6.5, 1.0, 400)), 20, 16384).astype(np.int64)
        fills.append(tokens[fill(tokens, 36864, 32768)].sum() / 36864)
    assert np.mean(fills) > 0.999
