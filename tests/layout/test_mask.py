# SPDX-License-Identifier: Apache-2.0
"""The mask follows the original's rule, and its closed forms agree with the dense oracle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file

from megatron_bagel.layout.items import Mode, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import build_pack
from tests.strategies import SPEC, samples


def test_masks_equal_the_original(goldens: Path) -> None:
    golden = json.loads((goldens / "data" / "packed_flex_0.json").read_text())
    lens = np.array(golden["sample_lens"][:-1])
    splits = np.array(golden["split_lens"][:-1])
    modes = np.array([Mode[name.upper()] for name in golden["attn_modes"][:-1]])
    dense = PackMask(lens, splits, modes).dense()
    recorded = load_file(goldens / "batches" / "nested_0_masks.safetensors")
    ends = np.cumsum(lens)
    for number, end in enumerate(ends):
        start = end - lens[number]
        np.testing.assert_array_equal(dense[start:end, start:end], recorded[f"mask_{number}"].astype(bool))
        assert not dense[start:end, :start].any() and not dense[start:end, end:].any()


@settings(max_examples=80, deadline=None)
@given(samples())
def test_row_areas_count_the_oracle(plan: list[Sample]) -> None:
    mask = PackMask.of(build_pack(plan, SPEC))
    np.testing.assert_array_equal(mask.row_areas(), mask.dense().sum(1))
    assert mask.area() == mask.dense().sum()


@settings(max_examples=30, deadline=None)
@given(samples())
def test_any_order_of_tokens_sees_the_same(plan: list[Sample]) -> None:
    mask = PackMask.of(build_pack(plan, SPEC))
    order = np.random.default_rng(0).permutation(mask.length + 3)
    dense = np.pad(mask.dense(), (0, 3))
    np.testing.assert_array_equal(mask.allowed(order, order), dense[np.ix_(order, order)])


def test_splits_and_samples_must_hold_the_same_tokens() -> None:
    with pytest.raises(ValueError, match="splits hold 3 tokens, samples 4"):
        PackMask(np.array([4]), np.array([3]), np.array([0]))
