# SPDX-License-Identifier: Apache-2.0
"""Runs parts within the time that is left. A part has a process group of its own, so that nothing of it outlives its limit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

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
        """Run a part and complete its record; return what became of it: done, done before, no time, stopped or failed."""
        path = self.path(part)
        if not self.again and path.exists() and read_record(path).figures.get("state") == "done":
            return self._told(part, "done before")
        left = self.ends - time.monotonic()
        if left < 5:
            return self._told(part, "no time")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        output = ("--output", str(path)) if part.records else ()
        start = time.monotonic()
        status, printed = _run([sys.executable, *part.command, *output], min(part.seconds, left))
        state = {0: "done", None: "stopped"}.get(status, "failed")
        facts: dict[str, Any] = {"state": state, "seconds": time.monotonic() - start, "exit_status": status}
        if not part.records or state != "done":
            facts["printed"] = printed.replace(str(ROOT), ".")[-_TAIL:]
        self._complete(part, path, facts)
        return self._told(part, state)

    def _complete(self, part: Part, path: Path, facts: dict[str, Any]) -> None:
        """Add what became of a part to its own record, or write one."""
        if path.exists():
            written = read_record(path)
            write_whole(path, replace(written, figures={**facts, **written.figures}).to_json())
        else:
            command = part.command[1:] if part.command[0] == "-m" else (str(ROOT / part.command[0]), *part.command[1:])
            name = " ".join(("python -m", *command)) if part.command[0] == "-m" else this_command(command)
            write_record(path, facts, name)

    def _told(self, part: Part, state: str) -> str:
        print(f"{part.name}: {state}; {max(0.0, self.ends - time.monotonic()):.0f} s are left", flush=True)
        return state


def _run(command: list[str], limit: float) -> tuple[int | None, str]:
    """Return the exit status (None if the limit ended it) and what the command printed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=limit)
        return process.returncode, printed
    except subprocess.TimeoutExpired:
        return None, _end(process)
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> str:
    """End a process group, politely first, and return what it printed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            printed, _ = process.communicate(timeout=_GRACE_SECONDS)
            return printed
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    printed, _ = process.communicate()
    return printed
