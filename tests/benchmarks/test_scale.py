# SPDX-License-Identifier: Apache-2.0
"""Figures of many ranks: host work that grows no faster than the packs, and scaling tables that a page takes in."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import host_work, scaling
from benchmarks.record import read_record


def test_host_work_is_measured_for_each_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host_work.main(["--replicas", "4", "16", "--steps", "1", "--output", str(tmp_path / "r.json")])
    sizes = read_record(tmp_path / "r.json").figures["replicas"]
    assert [sizes[name]["packs"] for name in ("4", "16")] == [4, 16] and sizes["16"]["samples"] > 2 * sizes["4"]["samples"]
    assert all(one[name] > 0 for one in sizes.values() for name in ("training_process_s", "planning_process_s", "layout_of_one_pack_s"))
    capsys.readouterr()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_scaling_tables_go_into_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- scaling -->\n<!-- /scaling -->\nafter\n")
    words = ["--model", "qwen2.5-0.5b-mot", "--gpu", "h100", "--gpus", "8", "16", "--global-batch", "32", "--tokens", "8192"]
    result = scaling.main([*words, "--into", str(page)])
    weak, strong = result["gpus"]["h100"]["weak"], result["gpus"]["h100"]["strong"]
    assert [row["packs"] for row in weak] == [16, 32] and [row["packs"] for row in strong] == [32, 32]
    assert strong[1]["step_s"] < strong[0]["step_s"] and weak[1]["hours_between_failures"] == weak[0]["hours_between_failures"] / 2
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "| 16 | 32 |" in text and "weak scaling (2 packs per GPU)" in text
    capsys.readouterr()
