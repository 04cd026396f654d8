# SPDX-License-Identifier: Apache-2.0
"""A file system of its own of a few bytes, where mounting is permitted; else a limit on the size of each file."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import TracebackType

ROOM = 1 << 30


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder, in whole pages as a file system counts them."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


class SmallDisk:
    """Within the block ``folder`` holds at most ``size`` bytes. ``mounted`` says whether it is a file system of its own."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size, self.mounted = folder, max(size, 1 << 14), False

    @property
    def largest_file(self) -> int | None:
        """The limit on each file where nothing could be mounted."""
        return None if self.mounted else self.size // 4

    def __enter__(self) -> SmallDisk:
        self.folder.mkdir(parents=True)
        self.mounted = self._mount(f"size={self.size}", "-t", "tmpfs", "tmpfs")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    def protect(self) -> None:
        """Let nobody write, root included."""
        self._mount("remount,ro")

    def enlarge(self) -> None:
        """Make room, and let everybody write."""
        if self.mounted:
            self._mount(f"remount,rw,size={ROOM}")

    def _mount(self, options: str, *kind: str) -> bool:
        command = ["mount", *kind[:2], "-o", options, *kind[2:], str(self.folder)]
        return subprocess.run(command, capture_output=True).returncode == 0
