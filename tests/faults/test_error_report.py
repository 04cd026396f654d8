# SPDX-License-Identifier: Apache-2.0
"""However many ranks fail, one report is printed, and it begins with what came first."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_bagel.training.observability.logging_sinks import LogFile
from megatron_bagel.training.resilience import error_report
from megatron_bagel.training.resilience.error_report import ErrorReport, RankError, describe
from tests.distributed import run_ranks


def _fail(folder: Path, wrong: dict[int, tuple[bool, str, str]], quiet: float) -> int | None:
    """Each rank raises what ``wrong`` says, after the first report has arrived if it says so; the exit code it would leave with."""
    import torch.distributed as dist

    error_report.QUIET_S = quiet
    follows, kind, text = wrong.get(dist.get_rank(), (False, "", ""))
    try:
        with ErrorReport(folder) as report:
            if follows:
                report._store.wait(["error/1"])
            if kind:
                raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind](text)
    except SystemExit as leaving:
        return leaving.code
    return None


@pytest.mark.distributed
def test_the_first_error_leads_and_the_rest_is_folded(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    closed = (True, "RuntimeError", "peer closed")
    wrong = {1: (False, "RuntimeError", "out of memory"), 0: closed, 2: closed}
    assert run_ranks(_fail, 4, tmp_path, wrong, 3.0) == [1, 1, 1, None]
    printed = capfd.readouterr().err
    assert printed.count("megatron_bagel.train: error") == 1 and "Traceback (" not in printed
    assert "error: rank 1 (" in printed and "RuntimeError: out of memory" in printed
    assert "then ranks 0, 2: RuntimeError: peer closed" in printed and "rank 3 still runs and waits for the others" in printed
    (report,) = (tmp_path / "errors").iterdir()
    assert report.read_text().count("Traceback (") == 3


@pytest.mark.distributed
def test_an_error_that_all_have_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wrong = {rank: (False, "ValueError", "--lr is wrong") for rank in range(3)}
    assert run_ranks(_fail, 3, tmp_path, wrong, error_report.MAX_WAIT_S) == [2, 2, 2]
    assert "megatron_bagel.train: error: --lr is wrong\n" in capfd.readouterr().err


@pytest.mark.distributed
@pytest.mark.parametrize(("kind", "status"), [("ValueError", 2), ("RuntimeError", 1)])
def test_a_report_that_cannot_be_written_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, status: int) -> None:
    (tmp_path / "file").touch()
    wrong = {rank: (False, kind, "--lr is wrong") for rank in range(2)}
    assert run_ranks(_fail, 2, tmp_path / "file", wrong, error_report.MAX_WAIT_S) == [status, status]
    printed = capfd.readouterr().err
    assert printed.count("--lr is wrong\n  The tracebacks could not be written into") == 1
    assert ("Traceback (" in printed) is (kind == "RuntimeError"), "a user's error needs no traceback, another one has no other place"


@pytest.mark.parametrize(("number", "user"), [(errno.ENOSPC, True), (errno.EACCES, True), (errno.ENOENT, False)])
def test_a_full_disk_is_for_the_user_to_change(number: int, user: bool) -> None:
    error = RankError.of(0, OSError(number, os.strerror(number), "results/metrics.jsonl"))
    assert error.user is user and "results/metrics.jsonl" in error.text and os.strerror(number) in error.text


def test_a_log_that_cannot_be_written_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    log = LogFile("/dev/full", encoding="utf-8")
    for line in ("one", "two"):
        log.handle(logging.makeLogRecord({"msg": line}))
    log.close()
    assert capsys.readouterr().err == f"megatron_bagel: /dev/full cannot be written: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n"


def test_the_report_names_the_command_as_it_was_started(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with ErrorReport(tmp_path, "megatron-bagel train"):
            raise RuntimeError("out of memory")

    with pytest.raises(AssertionError):
        run_ranks(fail, 1)
    assert "megatron-bagel train: error: RuntimeError: out of memory\n" in capfd.readouterr().err


def test_a_process_that_was_killed_does_not_run() -> None:
    process = subprocess.Popen(["sleep", "600"])
    assert error_report.process_runs(process.pid)
    process.kill()
    while error_report.process_runs(process.pid):  # a zombie until it is waited for
        time.sleep(0.01)
    process.wait()
    assert not error_report.process_runs(process.pid)


@given(st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["a", "b", "c"])), min_size=1, max_size=7, unique_by=lambda pair: pair[0]))
def test_every_rank_is_in_the_report(failed: list[tuple[int, str]]) -> None:
    errors = [RankError(rank, "host", text, "", False) for rank, text in failed]
    silent = sorted(set(range(7)) - {rank for rank, _ in failed})
    lines = describe(errors, silent).split("\n  ")
    assert lines[0].endswith(failed[0][1])
    assert len(lines) == len({text for _, text in failed}) + bool(silent)
