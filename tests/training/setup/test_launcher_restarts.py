# SPDX-License-Identifier: Apache-2.0
"""A restart by the launcher continues the run of its first start, and never one that the first start was refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.training.setup.launcher_restarts import restart_note
from megatron_bagel.training.setup.run_folders import taken_folders
from tests.training.setup.test_claim import earlier_run, logged, start


def restart(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))


def test_a_restart_continues_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_rank: None) -> None:
    restart(monkeypatch, 0)
    with taken_folders(start(tmp_path), tmp_path / "results") as first:
        assert not first.start.auto_resume
    logged(tmp_path / "results", 0, 1)
    restart(monkeypatch, 1)
    with taken_folders(start(tmp_path), tmp_path / "results") as again:
        assert (again.start.auto_resume, again.run_id, again.notes) == (True, first.run_id, (restart_note(),))


def test_a_restart_does_not_move_its_own_files_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_rank: None) -> None:
    earlier_run(tmp_path)
    restart(monkeypatch, 0)
    with taken_folders(start(tmp_path, overwrite=True), tmp_path / "results") as first:
        assert len(first.notes) == 2
    logged(tmp_path / "results", 0, 1)
    restart(monkeypatch, 1)
    with taken_folders(start(tmp_path, overwrite=True), tmp_path / "results") as again:
        assert (again.start.overwrite, again.run_id, again.notes) == (False, first.run_id, (restart_note(),))
    assert (tmp_path / "results/metrics.jsonl").is_file()


def test_a_restart_of_a_refused_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_rank: None) -> None:
    earlier_run(tmp_path)
    for number, message in enumerate(["the run cannot start: --checkpoint_dir", "its first start was refused: --checkpoint_dir"]):
        restart(monkeypatch, number)
        with pytest.raises(ValueError, match=message), taken_folders(start(tmp_path), tmp_path / "results"):
            pass
    restart(monkeypatch, 0)
    with taken_folders(start(tmp_path, overwrite=True), tmp_path / "results") as first:
        pass
    restart(monkeypatch, 1)
    with taken_folders(start(tmp_path, overwrite=True), tmp_path / "results") as again:
        assert again.run_id == first.run_id
