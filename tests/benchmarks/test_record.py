# SPDX-License-Identifier: Apache-2.0
"""A benchmark's record says what was run, where and on which code; the records of the repository are whole."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.record import RESULTS, ROOT, commit, read_record, report, this_command, write_record


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = write_record(tmp_path / "new" / "a.json", {"step_s": 0.5, "losses": [1.0, 2.0]}, "python -m benchmarks.step")
    assert read_record(tmp_path / "new" / "a.json") == written
    assert set(json.loads((tmp_path / "new" / "a.json").read_text())) == {"command", "machine", "date", "commit", "versions", "figures"}
    assert written.figures == {"step_s": 0.5, "losses": [1.0, 2.0]} and written.date.endswith("Z")
    assert written.versions["torch"] == version("torch") and "cores" in written.machine


def test_a_copy_without_the_repository_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCHMARK_COMMIT", "abc")
    assert commit() != "abc"  # the repository knows better
    monkeypatch.setattr("benchmarks.record._git", lambda *_: "")
    assert commit() == "abc"
    monkeypatch.delenv("BENCHMARK_COMMIT")
    assert commit() == "unknown"


def test_commands_are_those_of_the_repository() -> None:
    argv = [str(ROOT / "benchmarks" / "train_step.py"), "step", "--output", "a b.json", "--config", "bench-tiny", "--output=c"]
    assert this_command(argv) == "python -m benchmarks.train_step step --config bench-tiny"
    assert this_command([str(ROOT / "benchmarks" / "gpu_day" / "__main__.py")]) == "python -m benchmarks.gpu_day"
    assert this_command(["/somewhere/else/pytest", "-x"]) == "pytest -x"


def test_figures_are_printed_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(ROOT / "benchmarks" / "layout.py"), "--packs", "2"])
    report({"a": 1}, tmp_path / "r.json")
    assert json.loads(capsys.readouterr().out) == {"a": 1}
    assert read_record(tmp_path / "r.json").command == "python -m benchmarks.layout --packs 2"
    report({"a": 1}, None)
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_file_that_is_no_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text('{"figures": {}}')
    with pytest.raises(ValueError, match="r.json.*command.*but this has figures"):
        read_record(tmp_path / "r.json")


def test_records_of_the_repository_are_whole() -> None:
    for path in RESULTS.glob("*.json"):
        recorded = read_record(path)
        assert recorded.figures and not recorded.commit.endswith("with changes"), path
        assert str(ROOT) not in path.read_text()
