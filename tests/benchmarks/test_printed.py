# SPDX-License-Identifier: Apache-2.0
"""A record of a command says what it printed, how long it ran, and nothing when it failed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.printed import as_typed, kept_lines, main
from benchmarks.record import ROOT, read_record

_FIGURES = {"seconds", "processor_seconds", "peak_megabytes", "printed"}


def test_a_command_leaves_a_record_of_its_last_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "r.json"
    code = "import sys; print('first', flush=True); print('48 cases', file=sys.stderr)"
    assert main(["--output", str(output), "--", sys.executable, "-c", code]) == 0
    assert capfd.readouterr().out == "first\n48 cases\n"
    recorded = read_record(output)
    assert recorded.command.startswith("python -c ") and set(recorded.figures) == _FIGURES
    assert recorded.figures["printed"] == ["48 cases"] and recorded.figures["peak_megabytes"] > 1
    assert recorded.figures["processor_seconds"] > 0


def test_a_command_that_fails_leaves_none(tmp_path: Path) -> None:
    assert main(["--output", str(tmp_path / "r.json"), "--", sys.executable, "-c", "raise SystemExit(3)"]) == 3
    assert not list(tmp_path.iterdir())


def test_kept_lines_are_those_asked_for_and_few() -> None:
    lines = [f"step {number}\n" for number in range(20)] + ["\n", f"saved {ROOT}/results\n"]
    assert kept_lines(lines, []) == ["saved results"]
    assert kept_lines(lines, ["^saved", "step [01]$"]) == ["step 0", "step 1", "saved results"]
    assert kept_lines(lines, ["step"]) == [*(f"step {n}" for n in range(6)), "…", *(f"step {n}" for n in range(14, 20))]


def test_the_command_is_written_as_one_would_type_it() -> None:
    assert as_typed(["/somewhere/bin/python3.11", "tools/verify_golden.py"]) == "python tools/verify_golden.py"
    assert as_typed(["megatron-bagel", "plan", "--model", "a b"]) == "megatron-bagel plan --model 'a b'"
