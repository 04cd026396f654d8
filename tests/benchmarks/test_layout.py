# SPDX-License-Identifier: Apache-2.0
"""The layout benchmark reports what the dealing did, and block masks that hold the whole mask."""

from __future__ import annotations

import pytest

from benchmarks.layout import SIZES, measure_pack
from benchmarks.named_configs import CONFIGS, bench_pack


def test_numbers_of_a_pack() -> None:
    pack = bench_pack(CONFIGS["bench-53m"])
    result = measure_pack(pack)
    assert result["tokens"] == pack.sequence_length
    for ranks in SIZES:
        share = result["context_parallel"][str(ranks)]
        assert share["tokens"] == [pack.sequence_length // ranks, -(-pack.sequence_length // ranks)]
        assert share["area_imbalance"] == pytest.approx(1, abs=0.05) and share["area_imbalance"] >= 1
    blocks = result["block_mask"]
    rectangles = result["rectangles"]
    assert rectangles["sequence"]["rectangles"] <= rectangles["expert_sorted"]["rectangles"]
    assert min(rectangles[order]["tiles"] for order in ("expert_sorted", "sequence")) >= rectangles["tiles_of_the_area"]
    assert 0 <= blocks["blocks_without_mask"] < blocks["blocks_computed"] < blocks["blocks"]
