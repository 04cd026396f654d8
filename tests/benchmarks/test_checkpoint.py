# SPDX-License-Identifier: Apache-2.0
"""The checkpoint benchmark converts what it made without loss, and reports each number that it promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.checkpoint import main
from benchmarks.record import read_record

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_conversion_is_measured_against_a_copy(tmp_path: Path) -> None:
    main(["convert", "--gigabytes", "0.1", "--folder", str(tmp_path), "--out", str(tmp_path / "result.json")])
    result = read_record(tmp_path / "result.json").figures
    assert result["equal_after_both"] and 0.08e9 < result["weight_bytes"] < 0.12e9 and len(result["copy_s"]) == 3
    for way in ("hf_to_megatron", "megatron_to_hf"):
        assert result["start_peak_bytes"] < result[way]["peak_bytes"] < 1e9 and result[way]["speed_of_copying"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_saves_and_loads_are_timed_on_every_layout(tmp_path: Path) -> None:
    main(["saves", "--config", "bench-tiny", "--folder", str(tmp_path), "--out", str(tmp_path / "result.json")])
    result = read_record(tmp_path / "result.json").figures
    for name, times in (
        ("save_s", 3), ("background_stall_s", 3), ("background_until_published_s", 3),
        ("load_on_one_s", 2), ("load_on_tp2_s", 2), ("load_on_pp2_s", 2),
    ):  # fmt: skip
        assert len(result[name]) == times and min(result[name]) > 0, name
    for stall, end in zip(result["background_stall_s"], result["background_until_published_s"], strict=True):
        assert stall <= end
