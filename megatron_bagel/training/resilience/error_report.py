# SPDX-License-Identifier: Apache-2.0
"""Prints one readable report when ranks fail, instead of interleaved tracebacks.

A failing rank puts its error into the store of the rendezvous. The first such rank waits a moment for the others and prints a report: the
first error, the errors that followed, and the ranks without one. It writes the report with all tracebacks to ``errors/`` in results_dir.
The order of errors is the order of their arrival in the store; clocks are not compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_bagel.common.json_text import parse_json
from megatron_bagel.common.writable import ABOUT_DISKS
from megatron_bagel.parallel.rank_coordinates import rank_list
from megatron_bagel.platform.launch.process_group import side_store
from megatron_bagel.training.resilience import hang_watchdog

#: Seconds without a new error after which the report is made, and the longest wait for errors.
QUIET_S, MAX_WAIT_S = 2.0, 20.0


@dataclass(frozen=True)
class RankError:
    """The first error of a rank. ``text`` is its last line; ``user`` tells whether a setting or a file caused it."""

    rank: int
    host: str
    text: str
    trace: str
    user: bool

    @classmethod
    def of(cls, rank: int, error: BaseException) -> RankError:
        """Describe the exception ``error`` of ``rank``, which runs on this host."""
        user = isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno in ABOUT_DISKS)
        text = str(error) if isinstance(error, (ValueError, FloatingPointError)) else f"{type(error).__name__}: {error}"
        if user and isinstance(error, OSError):
            location = f"{error.filename}: " if error.filename else ""
            text = f"{location}{error.strerror}; make room, or make it accessible, and start again: the newest checkpoint is complete"
        return cls(rank, socket.gethostname(), text, "".join(traceback.format_exception(error)), user)


class ErrorReport:
    """Reports the errors of a run: ``with ErrorReport(results_dir):``. An error becomes SystemExit 2 for a ValueError, else 1.

    If the store does not answer, each rank prints its own error. Errors after a hang that the watchdog has reported are not printed,
    because ranks that end break the connections of others.
    """

    def __init__(self, results_dir: str | Path, command: str = hang_watchdog.COMMAND) -> None:
        self._command = command
        self._store, self._hang, self._folder = side_store("errors"), side_store(hang_watchdog.STORE), Path(results_dir) / "errors"
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store.set(f"process/{self._rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def __enter__(self) -> ErrorReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not isinstance(error, Exception):
            return
        rank_error = RankError.of(self._rank, error)
        try:
            if self._hang.check([hang_watchdog.REPORTED]):
                raise SystemExit(hang_watchdog.EXIT_CODE) from None
            self._gather(rank_error)
        except RuntimeError:  # torch's DistError: the host of the store is gone
            origin = f"on rank {rank_error.rank} ({rank_error.host}), and the store of the rendezvous does not answer"
            _say(f"{self._command}: error {origin}: {rank_error.trace}")
        except Exception as failure:  # whatever it is, the error of the run must be seen, and not this one
            origin = f"on rank {rank_error.rank} ({rank_error.host})"
            _say(f"{self._command}: error {origin}: {rank_error.text}\n  The report of it failed: {failure!r}")
        raise SystemExit(2 if rank_error.user else 1) from None

    def _gather(self, rank_error: RankError) -> None:
        """Store this rank's error. The first rank to do so reports the errors of all; the others wait for the report."""
        number = self._store.add("count", 1)
        self._store.set(f"error/{number}", json.dumps(asdict(rank_error)))
        if number > 1:
            self._wait_for_report()
            return
        errors = self._collect()
        silent = sorted(set(range(self._world_size)) - {error.rank for error in errors})
        report = describe(errors, silent, [rank for rank in silent if self._is_running(rank)])
        _say(f"{self._command}: error: {report}\n  {self._tracebacks(report, errors)}")
        self._store.set("reported", "1")

    def _wait_for_report(self) -> None:
        """Wait until the report is printed. A rank that exits earlier makes the launcher kill the rank that reports."""
        deadline = time.monotonic() + QUIET_S + MAX_WAIT_S
        while time.monotonic() < deadline and not self._store.check(["reported"]):
            time.sleep(0.1)

    def _collect(self) -> list[RankError]:
        """Return the errors in the order of their arrival, as soon as all ranks have one or no more arrive."""
        deadline, count = time.monotonic() + MAX_WAIT_S, 1
        quiet_end = time.monotonic() + QUIET_S
        while count < self._world_size and time.monotonic() < min(deadline, quiet_end):
            time.sleep(0.1)
            if (new_count := self._store.add("count", 0)) > count:
                count, quiet_end = new_count, time.monotonic() + QUIET_S
        keys = [f"error/{number}" for number in range(1, count + 1)]
        # A rank that died after it raised the count and before it stored its error has no text.
        return [RankError(**parse_json(self._store.get(key), key)) for key in keys if self._store.check([key])]

    def _tracebacks(self, report: str, errors: Sequence[RankError]) -> str:
        """Write the tracebacks and return where they are, or else those of errors that no setting or file causes."""
        try:
            return f"Tracebacks: {self._write(report, errors)}"
        except OSError as failure:
            traces = [error.trace for error in errors if not error.user]
            return "\n".join([f"The tracebacks could not be written into {self._folder} ({failure.strerror or failure}).", *traces])

    def _is_running(self, rank: int) -> bool:
        """Return whether a rank is known to run; nothing is known of ranks on other hosts."""
        if not self._store.check([f"process/{rank}"]):
            return False
        host, pid = parse_json(self._store.get(f"process/{rank}"), f"process/{rank}")
        return host == socket.gethostname() and process_runs(pid)

    def _write(self, report: str, errors: Sequence[RankError]) -> Path:
        """Write the report and all tracebacks to a new file, and return its path."""
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        number = len(list(self._folder.glob("*.txt"))) if self._folder.is_dir() else 0
        path = self._folder / f"{number:03d}-attempt-{attempt}.txt"
        self._folder.mkdir(parents=True, exist_ok=True)
        traces = [f"--- rank {error.rank} on {error.host} ---\n{error.trace}" for error in errors]
        path.write_text("\n".join([report, "", *traces]), encoding="utf-8")
        return path


def _say(text: str) -> None:
    """Print on stderr. If that is closed or on a full disk, nothing can be said."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def process_runs(pid: int) -> bool:
    """Return whether a process of this host runs. One that has ended and was not waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:  # no such process, or not Linux
        return False


def describe(errors: Sequence[RankError], silent: Sequence[int], waiting: Sequence[int] = ()) -> str:
    """Describe the first error and the ranks that have it, the errors of other ranks, and the ``silent`` ranks without one.

    The ``waiting`` ranks are silent ones that are known to run.
    """
    groups: dict[str, list[int]] = {}
    for error in errors:
        groups.setdefault(error.text, []).append(error.rank)
    (first, ranks), *later = groups.items()
    is_on_all_ranks = len(ranks) == len(errors) and not silent
    hosts = sorted({error.host for error in errors if error.text == first})
    origin = "" if is_on_all_ranks else f"{rank_list(ranks)} ({', '.join(hosts[:4])}): "
    lines = [f"{origin}{first}"]
    lines += [f"then {rank_list(later_ranks)}: {text.splitlines()[0][:300] if text else text}" for text, later_ranks in later]
    if waiting:
        verb = "runs and waits" if len(waiting) == 1 else "run and wait"
        lines.append(f"{rank_list(list(waiting))} still {verb} for the others")
    lost = [rank for rank in silent if rank not in waiting]
    if lost:
        lines.append(f"nothing from {rank_list(lost)}: killed (out of memory? the launcher knows its exit code), cut off, or still waiting")
    return "\n  ".join(lines)
