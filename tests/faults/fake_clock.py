# SPDX-License-Identifier: Apache-2.0
"""libfaketime, which makes the clock jump, and how to tell a run that hangs from a run that the library locks up.

The library has locks of its own that a fork inherits as they are. If another thread holds one at the moment of a fork (here of a writer of
a checkpoint), the fork waits for it for ever, and the run for the fork. Both variants do this: ``libfaketimeMT`` in any reading of the
clock, the other one in ``pthread_cond_init``. The kernel tells where a thread waits, so the lock is recognised by its address.
"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from pathlib import Path

import psutil

from tests.faults.commands import Command

#: Starts of one run until a machine counts as unable to do the fault.
ATTEMPTS = 4
#: Seconds that a thread waits for one lock of the library until the lock counts as lost. It is held for microseconds otherwise.
PATIENCE = 20.0
_FUTEX = {"x86_64": 202, "aarch64": 98}  # number of the system call by which a thread waits for a lock


def faketime_library() -> str | None:
    """Where libfaketime is: what FAKETIME_LIBRARY names, or the library of the system's package."""
    named = os.environ.get("FAKETIME_LIBRARY")
    found = sorted(Path("/usr").glob("lib/**/faketime/libfaketime.so.1")) if named is None else [Path(named)]
    return str(found[0]) if found else None


def variables(library: str, wall_clock: Path) -> dict[str, str]:
    """The environment of a program whose clock is ahead by what stands in the file ``wall_clock``."""
    return {
        "LD_PRELOAD": library,
        "FAKETIME_TIMESTAMP_FILE": str(wall_clock), "FAKETIME_CACHE_DURATION": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip


def locked_up(command: Command, library: str) -> bool:
    """Watch a command until it ends, is late, or a process of it is locked up inside the library; then it is killed."""
    since: dict[tuple[int, int], float] = {}
    while command.alive() and not command.is_late():
        time.sleep(0.5)
        waits = waits_inside(command.process_id, library)
        since = {wait: since.get(wait, time.monotonic()) for wait in waits}
        if since and time.monotonic() - min(since.values()) > PATIENCE:
            command.kill()
            return True
    return False


def waits_inside(process_id: int, library: str) -> set[tuple[int, int]]:
    """The threads of a process and its children that wait for a lock in the memory of a library: (thread, address of the lock)."""
    waits = set()
    with contextlib.suppress(psutil.NoSuchProcess, OSError):
        process = psutil.Process(process_id)
        for member in (process, *process.children(recursive=True)):
            memory = _memory_of(member.pid, library)
            for task in Path(f"/proc/{member.pid}/task").iterdir():
                call = (task / "syscall").read_text().split()
                if call[0] == str(_FUTEX.get(platform.machine())) and any(start <= int(call[1], 16) < end for start, end in memory):
                    waits.add((int(task.name), int(call[1], 16)))
    return waits


def _memory_of(process_id: int, library: str) -> list[tuple[int, int]]:
    """The ranges of a library in a process, with the memory without a name that follows its last one: variables that begin as zero."""
    ranges: list[tuple[int, int]] = []
    is_before_library = True
    for line in Path(f"/proc/{process_id}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(part, 16) for part in fields[0].split("-"))
        named = fields[5] if len(fields) == 6 else ""
        if named == library or (not named and ranges and not is_before_library and start == ranges[-1][1]):
            ranges.append((start, end))
            is_before_library = False
        elif named:
            is_before_library = True
    return ranges
