# SPDX-License-Identifier: Apache-2.0
"""Runs parts within the time that is left. A part has a process group of its own, so that nothing of it outlives its limit."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from benchmarks.gpu_day.parts import Part
from benchmarks.record import ROOT, machine, read_record, this_command, write_record
from megatron_bagel.common.files import write_whole

_TAIL = 4000
#: Seconds between the polite end of a part and the hard one.
_GRACE_SECONDS = 10


class Day:
    """The time that one machine is there, and the folder of the records."""

    def __init__(self, results: Path, seconds: float, again: bool = False) -> None:
        self.results, self.again = results, again
        self.machine = machine()
        self.ends = time.monotonic() + seconds

    def path(self, part: Part) -> Path:
        """Return the file of a part's record on this kind of machine."""
        kind = re.sub(r"[^a-z0-9]+", "-", self.machine.split(";")[0].split(",")[0].lower()).strip("-")
        return self.results / f"gpu_day-{kind}-{part.name}.json"

    def run(self, part: Part) -> str:
        """Run a part and complete its record; return what became of it: done, done before, left out, no time, stopped or failed."""
        path = self.path(part)
        earlier = read_record(path).figures.get("state") if path.exists() and not self.again else None
        if earlier == "done":
            return self._told(part, "done before")
        if part.needs is not None and importlib.util.find_spec(part.needs) is None:
            return self._told(part, "left out", f"; the package {part.needs} is not installed")
        left = self.ends - time.monotonic()
        if left < part.least_seconds:
            return self._told(part, "no time")
        path.parent.mkdir(parents=True, exist_ok=True)
        output = ["--output", str(path)] if part.records else []
        if part.resumes and earlier is not None:
            output.append("--resume")
        else:
            path.unlink(missing_ok=True)
        start = time.monotonic()
        facts: dict[str, Any] = {"state": "stopped", "exit_status": None}
        with tempfile.TemporaryFile("w+", errors="replace") as printed:
            try:
                facts["exit_status"] = status = _run([sys.executable, *part.command, *output], min(part.seconds, left), printed)
                facts["state"] = {0: "done", None: "stopped"}.get(status, "failed")
            finally:  # also when this program is ended
                facts["part_seconds"] = time.monotonic() - start
                if not part.records or facts["state"] != "done":
                    printed.seek(0)
                    facts["printed"] = printed.read().replace(str(ROOT), ".")[-_TAIL:]
                self._complete(part, path, facts)
        return self._told(part, facts["state"])

    def _complete(self, part: Part, path: Path, facts: dict[str, Any]) -> None:
        """Add what became of a part to its own record, or write one."""
        command = part.command[1:] if part.command[0] == "-m" else (str(ROOT / part.command[0]), *part.command[1:])
        name = " ".join(("python -m", *command)) if part.command[0] == "-m" else this_command(command)
        if path.exists():
            written = read_record(path)
            write_whole(path, replace(written, command=name, figures={**written.figures, **facts}).to_json())
        else:
            write_record(path, facts, name)

    def _told(self, part: Part, state: str, why: str = "") -> str:
        print(f"{part.name}: {state}{why}; {max(0.0, self.ends - time.monotonic()):.0f} s are left", flush=True)
        return state


def _run(command: list[str], limit: float, printed: IO[str]) -> int | None:
    """Write what the command prints to ``printed``, and return its exit status, or None if the limit ended it.

    ``printed`` is a file: a pipe would stay open as long as any process that the command leaves behind.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what is left of a process group, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_GRACE_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
