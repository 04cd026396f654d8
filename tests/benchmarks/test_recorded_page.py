# SPDX-License-Identifier: Apache-2.0
"""The page of recorded runs says what the records say, and leaves none out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.record import RESULTS, Record
from benchmarks.recorded_page import PAGE, figures, page, row

RECORD = Record(
    command="python -m benchmarks.layout", machine="a laptop, 2 cores", date="2026-11-28T10:00:00Z", commit="0123456",
    versions={"torch": "2.13.0", "python": "3.11"}, figures={"step": {"seconds": 1.25}, "losses": [0.5, 0.25], "name": "x", "ok": True},
)  # fmt: skip


def test_the_page_is_what_the_records_say() -> None:
    assert list(RESULTS.rglob("*.json"))
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.recorded_page"


def test_a_row_has_the_command_the_machine_and_the_figures() -> None:
    assert list(figures(RECORD.figures)) == [("step seconds", 1.25), ("losses 0", 0.5), ("losses 1", 0.25)]
    assert row("layout.json", RECORD) == (
        "| `python -m benchmarks.layout`<br>a laptop, 2 cores<br>2026-11-28, `0123456`, torch 2.13.0 | "
        "step seconds 1.25; losses 0 0.5; losses 1 0.25 |\n"
    )


def test_a_row_of_many_figures_names_its_file() -> None:
    many = Record(**{**RECORD.__dict__, "figures": {str(number): number for number in range(20)}})
    assert row("a/many.json", many).endswith("11 11; 8 more in `a/many.json` |\n")


def test_what_a_program_is_measured_for_comes_first_and_lines_come_last() -> None:
    step = {"threads": 1, "step_s": 2.0, "tokens_per_s": 3.0, "printed": ["step 1", "a | b"]}
    shown = row("x.json", Record(**{**RECORD.__dict__, "command": "python -m benchmarks.train_step step", "figures": step}))
    assert shown.endswith("step_s 2; tokens_per_s 3; threads 1<br>`step 1`<br>`a / b` |\n")


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"command": "x"}))
    with pytest.raises(ValueError, match=r"x\.json"):
        page(tmp_path)
