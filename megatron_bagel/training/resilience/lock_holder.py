# SPDX-License-Identifier: Apache-2.0
"""The process that holds the lock of a folder, as its lock file describes it."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from megatron_bagel.common.files import process_exists
from megatron_bagel.common.json_text import parse_json


@dataclass(frozen=True)
class LockHolder:
    """A process on a host.

    Attributes:
        host: Name of the host, for people.
        machine: The boot of the host and the process namespace, inside which ``process`` means one process.
        process: Process number.
        started: When the process started, in the kernel's own count: numbers are used again. Empty where the kernel does not say.
        since: When the lock was taken, for people.
        token: Drawn for this lock.
    """

    host: str
    machine: str
    process: int
    started: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> LockHolder:
        """Describe the process that calls this, with a new token."""
        since = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return cls(socket.gethostname(), _machine(), os.getpid(), _start_of(os.getpid()), since, secrets.token_hex(8))

    @classmethod
    def parse(cls, text: str) -> LockHolder | None:
        """Return the holder that a lock file describes; None for a file that was not written completely."""
        try:
            return cls(**parse_json(text))
        except (ValueError, TypeError):
            return None

    def text(self) -> str:
        """Return the content of the lock file."""
        return json.dumps(asdict(self)) + "\n"

    def is_here(self) -> bool:
        """Return whether this process can see the holder among the processes of its own machine."""
        return bool(self.machine) and self.machine == _machine()

    def is_this_process(self) -> bool:
        """Return whether this process took the lock: an attempt before a restart in the same process did not release it."""
        return self.is_here() and self.process == os.getpid() and self.started == _start_of(self.process)

    def is_alive(self) -> bool:
        """Return whether the holder still runs. Only for a holder that ``is_here``."""
        if not process_exists(self.process):
            return False
        state, started = _state_of(self.process), _start_of(self.process)
        return state != "Z" and started == self.started

    def __str__(self) -> str:
        """The holder in a sentence."""
        return f"process {self.process} on host {self.host}, since {self.since}"


def _machine() -> str:
    """Return the boot of this kernel and the namespace of process numbers; empty where the kernel names neither."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _stat_of(process: int) -> list[str]:
    try:
        # The name, in parentheses, may hold spaces.
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _state_of(process: int) -> str:
    fields = _stat_of(process)
    return fields[0] if fields else ""


def _start_of(process: int) -> str:
    fields = _stat_of(process)
    return fields[19] if len(fields) > 19 else ""
