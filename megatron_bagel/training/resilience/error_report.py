"""One readable report when ranks fail, in place of as many interleaved tracebacks.

A failing rank puts its error into the store of the rendezvous. The one that came first waits a moment for the others, prints a report
(what came first, what followed from it, who said nothing) and writes it with all tracebacks to ``errors/`` in results_dir. Which came
first is the order of arrival in the store, not a comparison of clocks.
"""

from __future__ import annotations

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

from megatron_bagel.parallel.rank_coordinates import rank_list
from megatron_bagel.platform.launch.process_group import side_store
from megatron_bagel.training.resilience import hang_watchdog

#: Seconds between the last error that arrived and the report, and the most that is waited.
QUIET, MOST = 2.0, 20.0


@dataclass(frozen=True)
class RankError:
    """The first error of a rank; ``text`` is its last line, ``user`` whether it is one that a setting or a file causes."""

    rank: int
    host: str
    text: str
    trace: str
    user: bool

    @classmethod
    def of(cls, rank: int, error: BaseException) -> RankError:
        """From the exception as it came up."""
        user = isinstance(error, ValueError)
        text = str(error) if user or isinstance(error, FloatingPointError) else f"{type(error).__name__}: {error}"
        return cls(rank, socket.gethostname(), text, "".join(traceback.format_exception(error)), user)


class ErrorReport:
    """``with ErrorReport(results_dir):`` around a run. An error inside becomes SystemExit: 2 for a ValueError, else 1.

    Without a store that answers, each rank prints its own error. Nothing is said of errors that follow from a hang which the watchdog has
    reported already: ranks that end break the connections of others.
    """

    def __init__(self, results_dir: str | Path, command: str = "megatron_bagel.train") -> None:
        self._command = command
        self._store, self._hang, self._folder = side_store("errors"), side_store(hang_watchdog.STORE), Path(results_dir) / "errors"
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._store.set(f"process/{self._rank}", json.dumps([socket.gethostname(), os.getpid()]))

    def __enter__(self) -> ErrorReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or not isinstance(error, Exception):
            return
        own = RankError.of(self._rank, error)
        try:
            if self._hang.check([hang_watchdog.REPORTED]):
                raise SystemExit(hang_watchdog.EXIT_CODE) from None
            self._gather(own)
        except RuntimeError:  # torch's DistError: the host of the store is gone
            where = f"on rank {own.rank} ({own.host}), and the store of the rendezvous does not answer"
            print(f"{self._command}: error {where}: {own.trace}", file=sys.stderr, flush=True)
        raise SystemExit(2 if own.user else 1) from None

    def _gather(self, own: RankError) -> None:
        number = self._store.add("count", 1)
        self._store.set(f"error/{number}", json.dumps(asdict(own)))
        if number > 1:
            self._wait_for_report()
            return
        errors = self._collect()
        silent = sorted(set(range(self._world_size)) - {error.rank for error in errors})
        report = describe(errors, silent, [rank for rank in silent if self._is_running(rank)])
        path = self._write(report, errors)
        print(f"{self._command}: error: {report}\n  Tracebacks: {path}", file=sys.stderr, flush=True)
        self._store.set("reported", "1")

    def _wait_for_report(self) -> None:
        """A rank that left at once would make the launcher end the one that reports."""
        deadline = time.monotonic() + QUIET + MOST
        while time.monotonic() < deadline and not self._store.check(["reported"]):
            time.sleep(0.1)

    def _collect(self) -> list[RankError]:
        """Errors in the order of their arrival, until all ranks have one or no more come."""
        deadline, known = time.monotonic() + MOST, 1
        quiet = time.monotonic() + QUIET
        while known < self._world_size and time.monotonic() < min(deadline, quiet):
            time.sleep(0.1)
            if (count := self._store.add("count", 0)) > known:
                known, quiet = count, time.monotonic() + QUIET
        keys = [f"error/{number}" for number in range(1, known + 1)]
        # A rank that died between counting itself and saying why has no text.
        return [RankError(**json.loads(self._store.get(key))) for key in keys if self._store.check([key])]

    def _is_running(self, rank: int) -> bool:
        """Return whether a rank is known to run; nothing is known of ranks on other hosts."""
        if not self._store.check([f"process/{rank}"]):
            return False
        host, pid = json.loads(self._store.get(f"process/{rank}"))
        return host == socket.gethostname() and process_runs(pid)

    def _write(self, report: str, errors: Sequence[RankError]) -> Path:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        number = len(list(self._folder.glob("*.txt"))) if self._folder.is_dir() else 0
        path = self._folder / f"{number:03d}-attempt-{attempt}.txt"
        self._folder.mkdir(parents=True, exist_ok=True)
        traces = [f"--- rank {error.rank} on {error.host} ---\n{error.trace}" for error in errors]
        path.write_text("\n".join([report, "", *traces]), encoding="utf-8")
        return path


def process_runs(pid: int) -> bool:
    """Return whether a process of this host runs. One that has ended and was not waited for does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:  # no such process, or not Linux
        return False


def describe(errors: Sequence[RankError], silent: Sequence[int], waiting: Sequence[int] = ()) -> str:
    """The first error, who had the same, what others said, and who said nothing; ``waiting`` ranks of these are known to run."""
    groups: dict[str, list[int]] = {}
    for error in errors:
        groups.setdefault(error.text, []).append(error.rank)
    (first, ranks), *later = groups.items()
    everywhere = len(ranks) == len(errors) and not silent
    hosts = sorted({error.host for error in errors if error.text == first})
    where = "" if everywhere else f"{rank_list(ranks)} ({', '.join(hosts[:4])}): "
    lines = [f"{where}{first}"]
    lines += [f"then {rank_list(others)}: {text.splitlines()[0][:300] if text else text}" for text, others in later]
    if waiting:
        verb = "runs and waits" if len(waiting) == 1 else "run and wait"
        lines.append(f"{rank_list(list(waiting))} still {verb} for the others")
    lost = [rank for rank in silent if rank not in waiting]
    if lost:
        lines.append(f"nothing from {rank_list(lost)}: killed (out of memory? the launcher knows its exit code), cut off, or still waiting")
    return "\n  ".join(lines)
