# SPDX-License-Identifier: Apache-2.0
"""Runs this package's commands in processes of their own, their output in a log that an error shows the end of."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_TAIL_LINES = 20
_POLL_SECONDS = 0.5
#: Seconds that a stopped command gets to save and end.
_GRACE_SECONDS = 60


class CommandFailedError(Exception):
    """Says which command ended with which status, and shows the end of its output."""


def module_command(*words: str | Path) -> list[str]:
    """Return the command line of ``megatron-bagel WORDS`` for this interpreter."""
    return [sys.executable, "-m", "megatron_bagel", *map(str, words)]


def launched_command(processes: int, *words: str | Path) -> list[str]:
    """Return the same under torchrun, as ``processes`` ranks of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, "-m", "megatron_bagel", *map(str, words)]


def run(commands: Sequence[Sequence[str]], log: Path, threads: int = 1, watch: Callable[[], None] | None = None) -> None:
    """Run commands side by side until all have ended.

    Args:
        commands: Command lines; all write to ``log``.
        log: File that their output is appended to.
        threads: Threads of each process.
        watch: Called about twice a second, and once after the end.

    Raises:
        CommandFailedError: One ended with another status than 0. The others are stopped.
        KeyboardInterrupt: The user interrupted; the commands were stopped first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # torch warns of an old package at every import, the launcher's included, which only the environment reaches.
    warning = "ignore:The pynvml package is deprecated:FutureWarning"
    given = os.environ.get("PYTHONWARNINGS")
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": f"{warning},{given}" if given else warning}
    with log.open("a", encoding="utf-8") as output:
        processes = [subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) for command in commands]
        try:
            while _all_are_well(processes):
                if watch is not None:
                    watch()
                time.sleep(_POLL_SECONDS)
            statuses = [process.poll() for process in processes]
        finally:
            _stop(processes)
    if watch is not None:
        watch()
    for command, status in zip(commands, statuses, strict=True):
        if status:
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
            raise CommandFailedError(f"{' '.join(command)}\nended with status {status}; the end of {log}:\n{tail}")


def _all_are_well(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Return whether some process still runs and none has failed."""
    statuses = [process.poll() for process in processes]
    return None in statuses and not any(statuses)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    for process in running:
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
