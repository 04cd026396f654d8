# SPDX-License-Identifier: Apache-2.0
"""Reads files larger than memory can keep without filling it: what was read leaves memory at once.

The system would keep all of it, push other files out, and search for new pages all the time, which costs a virtual machine more than
copying. ``direct_file.py`` writes such files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from io import FileIO
from pathlib import Path

_LARGE_SHARE = 4  # files larger than this part of memory are not kept in it
_READ_BYTES = 1 << 26
#: The system keeps files in pieces of up to this size, and drops none of which only a part is named.
LARGEST_PIECE = 1 << 24  # bytes


@cache
def large_bytes() -> int:
    """Return the size from which on a file is too large to be kept in memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _LARGE_SHARE


def large_together(files: Iterable[Path]) -> bool:
    """Return whether files that are read one after another are too large to be kept in memory; those that are missing have no size."""
    return sum(file.stat().st_size for file in files if file.is_file()) > large_bytes()


def read_fully(file: FileIO, content: memoryview, forgets: bool) -> bool:
    """Fill ``content`` from an unbuffered file, and return whether the file was long enough.

    With ``forgets`` the system need not keep what was read in memory. Two threads share a long read, since new memory costs more than the
    disk.
    """
    start, end = file.tell(), file.tell() + content.nbytes
    if content.nbytes <= _READ_BYTES:
        complete = _read_piece(file, content)
        if forgets:
            _forget(file.fileno(), start - LARGEST_PIECE, end)
        return complete
    bounds = [start, *range(start - start % _READ_BYTES + _READ_BYTES, end, _READ_BYTES), end]

    def read(first: int, last: int) -> bool:
        with open(file.name, "rb", buffering=0) as own:  # its own position
            own.seek(first)
            complete = _read_piece(own, content[first - start : last - start])
            if forgets:
                _forget(own.fileno(), first - LARGEST_PIECE if first == start else first, last)
            return complete

    with ThreadPoolExecutor(max_workers=2) as pool:
        complete = all(pool.map(read, bounds[:-1], bounds[1:]))
    file.seek(end)
    return complete


def _read_piece(file: FileIO, content: memoryview) -> bool:
    while content.nbytes:
        num_bytes = file.readinto(content)
        if not num_bytes:
            return False
        content = content[num_bytes:]
    return True


def forget_part(path: Path, start: int, end: int | None = None) -> None:
    """Drop the bytes from ``start`` to ``end`` of a file, or to its end, from memory.

    Pages stay that wait to be written, or that the system is just reading ahead.
    """
    with path.open("rb", buffering=0) as file:
        _forget(file.fileno(), start, end)


def _forget(descriptor: int, start: int, end: int | None) -> None:
    start = max(0, start)
    if hasattr(os, "posix_fadvise"):  # absent on macOS
        with suppress(OSError):  # some file systems know no such advice
            # A length of 0 means all that follows.
            os.posix_fadvise(descriptor, start, 0 if end is None else end - start, os.POSIX_FADV_DONTNEED)
