# SPDX-License-Identifier: Apache-2.0
"""Training and validation rows are two parts of every dataset, the same whatever else changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.data.index.train_val_split import TrainValRows, TrainValSplit

WEIGHTS = st.sampled_from(["99,1", "1,1", "9,1", "969,31", "3,1", "1,0", "100,0.5"])


def rows_of(total: int, stop: int, weights: str | None, part: str, dataset: str = "text/plain") -> list[int]:
    rows = TrainValRows(dataset, total, stop, TrainValSplit.parse(weights, part))
    return rows[np.arange(len(rows))].tolist()


@given(st.integers(0, 700), st.integers(0, 700), WEIGHTS)
def test_every_row_is_in_one_part(total: int, stop: int, weights: str) -> None:
    stop = min(stop, total)
    train, validation = (rows_of(total, stop, weights, part) for part in ("train", "validation"))
    assert sorted(train + validation) == list(range(stop))
    assert train == sorted(train) and validation == sorted(validation)
    # The choice is that of the whole dataset: taking fewer rows moves none to the other part.
    assert validation == [row for row in rows_of(total, total, weights, "validation") if row < stop]
    for part, rows in (("train", train), ("validation", validation)):
        held = TrainValRows("text/plain", total, stop, TrainValSplit.parse(weights, part)).contains(np.arange(total))
        assert np.flatnonzero(held).tolist() == rows


@given(st.integers(2, 700), WEIGHTS)
def test_the_share_is_kept_and_no_dataset_goes_without(total: int, weights: str) -> None:
    block = TrainValSplit.parse(weights).block
    held_out = len(rows_of(total, total, weights, "validation"))
    if block:
        assert max(1, total // block) <= held_out <= total // block + 1
    else:
        assert held_out == 0


def test_places_are_random_access_and_datasets_differ() -> None:
    rows = TrainValRows("text/plain", 10**12, 10**12, TrainValSplit.parse("99,1"))
    assert len(rows) == 99 * 10**10
    assert int(rows[10**11]) == rows[np.array([5, 10**11])][1] and 1.0101e11 < int(rows[10**11]) < 1.0102e11
    with pytest.raises(IndexError, match="train part of text/plain"):
        rows[np.array([len(rows)])]
    assert rows_of(5000, 5000, "99,1", "validation") != rows_of(5000, 5000, "99,1", "validation", "text/other")
    assert rows_of(100, 100, None, "train") == list(range(100)) and rows_of(100, 100, None, "validation") == []


@pytest.mark.parametrize("weights", ["99", "1,99", "a,b", "0,0", "-1,1", "98,1,1", "nan,1", "inf,1", ""])
def test_bad_weights_name_the_flag(weights: str) -> None:
    with pytest.raises(ValueError, match="--split"):
        TrainValSplit.parse(weights)
