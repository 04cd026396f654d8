# SPDX-License-Identifier: Apache-2.0
"""Keyed randomness: the answer depends on the name only, scalar and array forms agree, and the numbers look random."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.keyed_random import keyed_generator, keyed_integers, keyed_normal, keyed_uniform, keyed_word

PART = st.one_of(st.integers(-(2**40), 2**40), st.text(max_size=8))


@given(st.integers(0, 2**40), st.lists(PART, max_size=5))
@settings(max_examples=50, deadline=None)
def test_same_name_same_numbers(seed: int, what: list) -> None:
    first = keyed_generator(seed, *what).standard_normal(8)
    keyed_generator(seed, "something else").standard_normal(100)
    assert np.array_equal(first, keyed_generator(seed, *what).standard_normal(8))
    assert not np.array_equal(first, keyed_generator(seed, *what, 0).standard_normal(8))
    assert not np.array_equal(first, keyed_generator(seed + 1, *what).standard_normal(8))


@given(
    st.integers(0, 2**40),
    st.lists(PART, max_size=2),
    st.lists(st.integers(-(2**40), 2**40), min_size=1, max_size=6),
    st.lists(PART, max_size=2),
)
@settings(max_examples=50, deadline=None)
def test_array_form_equals_scalar_form(seed: int, before: list, indexes: list[int], after: list) -> None:
    words = keyed_word(seed, *before, np.array(indexes), *after)
    assert [int(w) for w in words] == [keyed_word(seed, *before, i, *after) for i in indexes]
    uniforms = keyed_uniform(seed, *before, np.array(indexes), *after)
    assert list(uniforms) == [keyed_uniform(seed, *before, i, *after) for i in indexes]
    chosen = keyed_integers(7, seed, *before, np.array(indexes), *after)
    assert list(chosen) == [keyed_integers(7, seed, *before, i, *after) for i in indexes]


def test_order_and_type_of_parts_count() -> None:
    names = [(1, 2), (2, 1), ("1", 2), (12,), ("12",), ("1", "2"), (1, 2, 0)]
    assert len({keyed_word(5, *name) for name in names}) == len(names)


def test_uniforms_are_uniform_and_neighbours_unrelated() -> None:
    draws = keyed_uniform(3, "dataset", np.arange(200_000), 0, "caption")
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.histogram(draws, 100, (0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 160  # chi-square, 99 degrees of freedom: p < 1e-4 beyond
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    other_epoch = keyed_uniform(3, "dataset", np.arange(200_000), 1, "caption")
    assert abs(np.corrcoef(draws, other_epoch)[0, 1]) < 0.01


def test_normals() -> None:
    noise = keyed_normal((64, 1000), 0, "flow")
    assert noise.shape == (64, 1000)
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 1) < 0.02


def test_another_process_agrees() -> None:
    """Python's own hash() differs between processes; ours must not."""
    code = "from megatron_bagel.data.keyed_random import keyed_uniform as u; print(repr(u(11, 't2i/shapes', 3, 1, 'caption')))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(printed) == keyed_uniform(11, "t2i/shapes", 3, 1, "caption")


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="at least one"):
        keyed_integers(0, 1, "caption")
