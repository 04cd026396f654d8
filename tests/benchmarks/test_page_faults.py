# SPDX-License-Identifier: Apache-2.0
"""The benchmark measures this process and fresh ones, every size of temporary."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.page_faults import main, measure_settings
from benchmarks.record import read_record

SIZES = {"24 MiB", "256 MiB"}


def test_this_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    result = main(["--in-this-process", "--repeats", "2", "--output", str(out)])
    assert read_record(out).figures == json.loads(capsys.readouterr().out) == result
    assert set(result) == SIZES and all(len(figures["later_faults"]) == 2 for figures in result.values())


@pytest.mark.slow
def test_a_fresh_process() -> None:
    result = measure_settings(huge_pages=False, keep_freed=False, repeats=1)
    assert set(result) == SIZES and all(len(figures["later_faults"]) == 1 for figures in result.values())
