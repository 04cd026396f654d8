# SPDX-License-Identifier: Apache-2.0
"""The ramp of the batch size: monotonous, ends where it should, and is a function of the packs alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.config.batch_size import BatchSizes


@given(start=st.integers(1, 20), increment=st.integers(1, 8), steps=st.integers(1, 10), packs=st.integers(1, 500))
def test_batches_grow_from_start_to_final(start: int, increment: int, steps: int, packs: int) -> None:
    final = start + steps * increment
    sizes = BatchSizes.of(final, [start, increment, packs])
    consumed, seen = 0, []
    while consumed <= packs + final:
        seen.append(sizes.at(consumed))
        consumed += seen[-1]
    assert seen[0] == start and seen[-1] == final
    assert seen == sorted(seen) and set(seen) <= set(sizes.steps)
    assert sizes.steps[0] == start and sizes.steps[-1] == final and len(sizes.steps) == steps + 1


def test_without_a_ramp_every_batch_is_the_same() -> None:
    sizes = BatchSizes.of(6, [])
    assert {sizes.at(packs) for packs in (0, 6, 1000)} == {6} and sizes.steps == [6]


@pytest.mark.parametrize(
    ("rampup", "said"),
    [
        ([2, 2], "three numbers"),
        ([0, 2, 8], "at least 1"),
        ([2, 2, 0], "at least 1"),
        ([2, 3, 8], "11 would do"),
        ([10, 2, 8], "12 would do"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(rampup: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=f"rampup_batch_size.*{said}"):
        BatchSizes.of(10, rampup)
