# SPDX-License-Identifier: Apache-2.0
"""The shuffled order visits every row once, differs between epochs and is the same wherever it is entered."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.planner.permutation import _feistel, permuted


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_every_row_once(size: int, seed: int, epoch: int) -> None:
    rows = permuted(np.arange(size), size, seed, "order", epoch)
    assert np.array_equal(np.sort(rows), np.arange(size))


@given(st.integers(5, 3000), st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_network_is_a_bijection_of_any_range(size: int, seed: int) -> None:
    rows = _feistel(np.arange(size), size, seed, ("order", 0))
    assert np.array_equal(np.sort(rows), np.arange(size))


@pytest.mark.parametrize("size", [65_536, 65_537, 200_000, (1 << 17) + 1])
def test_large_orders_are_complete_and_look_shuffled(size: int) -> None:
    rows = permuted(np.arange(size), size, 1, "order", 0)
    assert np.array_equal(np.sort(rows), np.arange(size))
    assert abs(np.corrcoef(rows, np.arange(size))[0, 1]) < 0.02
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.02
    # a permutation without structure fixes about one place; a badly mixed one fixes many or repeats its steps
    assert (rows == np.arange(size)).sum() < 12
    assert np.unique(np.diff(rows)).size > 0.3 * size
    assert (rows == permuted(np.arange(size), size, 1, "order", 1)).sum() < 12


def test_random_access_without_memory() -> None:
    size = 10**9 + 7
    places = np.array([0, 1, 12345, size - 1])
    together = permuted(places, size, 3, "order", 2)
    assert together.min() >= 0 and together.max() < size
    assert [int(permuted(places[i : i + 1], size, 3, "order", 2)[0]) for i in range(4)] == list(together)
