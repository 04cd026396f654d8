# SPDX-License-Identifier: Apache-2.0
"""A lock on a folder: one process writes into it at a time, on any file system, with no lock of the system.

The lock is a file that its holder creates exclusively and touches every few seconds. A holder on this machine is looked up among the
processes. A holder on another one is alive while its file changes; clocks of two hosts are never compared.

<folder>/run.lock         JSON: host, process and time
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_bagel.training.resilience.lock_holder import LockHolder

LOCK = "run.lock"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LockTimes:
    """Seconds between two signs of life of a holder, and without one until a holder on another host counts as gone."""

    beat: float = 10.0
    patience: float = 60.0


class RunLock:
    """The lock of one folder. ``flag`` names the folder in messages, such as ``--checkpoint_dir``."""

    def __init__(self, folder: Path, flag: str, times: LockTimes = LockTimes()) -> None:
        self._folder, self._flag, self._times = folder, flag, times
        self._path = folder / LOCK
        self._own = LockHolder.this_process()
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, also from a holder that is gone. Raises ValueError if another process holds it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        while not self._create():
            text = self._read()
            if text is None:  # released meanwhile
                continue
            holder = LockHolder.parse(text)
            if not self._is_gone(holder, text):
                raise ValueError(
                    f"{self._flag} {self._folder} is in use by another run ({holder or 'which has just begun'}); wait for its end, "
                    "stop it, or choose another folder"
                )
            self._remove(text)
        threading.Thread(target=self._show_life, name="run lock", daemon=True).start()

    def check(self) -> None:
        """Raise ValueError if another process has taken the lock from one that showed no life. A lost file is made again."""
        text = self._read()
        if text is None and self._create():
            return
        if (text or self._read()) != self._own.text():
            raise ValueError(
                f"{self._flag} {self._folder} was taken over by another run ({LockHolder.parse(text or '') or 'unknown'}), because this "
                "one gave no sign of life; this one ends, so that the two do not write over each other"
            )

    def release(self) -> None:
        """Give the lock back. It stays with another process that has taken it over."""
        self._released.set()
        if self._read() == self._own.text():
            self._path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self._own.text())
        return True

    def _read(self) -> str | None:
        try:
            return self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def _is_gone(self, holder: LockHolder | None, text: str) -> bool:
        if holder is not None and holder.is_here():
            return holder.is_this_process() or not holder.is_alive()
        logger.warning(
            "%s %s is locked by %s: waiting up to %g s for a sign of its life", self._flag, self._folder, holder or "another process",
            self._times.patience,
        )  # fmt: skip
        return self._stays_still(text)

    def _stays_still(self, text: str) -> bool:
        """Return whether the file does not change while this process waits. It vanishes when its holder ends: then it is gone too."""
        first = self._touched()
        deadline = time.monotonic() + self._times.patience
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._times.beat))
            current = self._read()
            if current is None:
                return True
            if current != text or self._touched() != first:
                return False
        return True

    def _touched(self) -> int:
        try:
            with self._path.open("rb") as file:  # a shared file system asks its server only on opening
                return os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return 0

    def _remove(self, text: str) -> None:
        """Remove the lock of a holder that is gone, unless another process has taken its place by now."""
        aside = self._path.with_name(f"{LOCK}.{secrets.token_hex(4)}")
        try:
            self._path.rename(aside)
        except FileNotFoundError:
            return
        if aside.read_text(encoding="utf-8") != text and not self._path.exists():
            aside.rename(self._path)
        aside.unlink(missing_ok=True)

    def _show_life(self) -> None:
        while not self._released.wait(self._times.beat):
            # A file system that does not answer for a moment: the next touch, or the check before a save, finds out.
            with contextlib.suppress(OSError):
                if self._read() != self._own.text():
                    return
                os.utime(self._path)
