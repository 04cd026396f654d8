# SPDX-License-Identifier: Apache-2.0
"""Reads and writes files larger than memory can keep without filling it: what is done with goes to the disk and out of memory at once.

The system would keep all of it, push other files out, and search for new pages all the time, which costs a virtual machine more than
copying.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from io import FileIO
from typing import IO

_LARGE_SHARE = 4  # files larger than this part of memory are not kept in it
_FLUSHED_BYTES = 1 << 28
_READ_BYTES = 1 << 26
#: The system keeps files in pieces of up to this size, and drops none of which only a part is named.
_LARGEST_PIECE = 1 << 24  # bytes


@cache
def large_bytes() -> int:
    """Return the size from which on a file is too large to be kept in memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _LARGE_SHARE


def read_fully(file: FileIO, content: memoryview, read_once: bool) -> bool:
    """Fill ``content`` from an unbuffered file, and return whether the file was long enough.

    With ``read_once`` a large file is not kept in memory. Two threads share a long read, since new memory costs more than the disk.
    """
    start, end = file.tell(), file.tell() + content.nbytes
    forgets = read_once and os.fstat(file.fileno()).st_size > large_bytes()
    if content.nbytes <= _READ_BYTES:
        complete = _read_piece(file, content)
        if forgets:
            _forget(file.fileno(), start - _LARGEST_PIECE, end)
        return complete
    bounds = [start, *range(start - start % _READ_BYTES + _READ_BYTES, end, _READ_BYTES), end]

    def read(first: int, last: int) -> bool:
        with open(file.name, "rb", buffering=0) as own:  # its own position
            own.seek(first)
            complete = _read_piece(own, content[first - start : last - start])
            if forgets:
                _forget(own.fileno(), first - _LARGEST_PIECE if first == start else first, last)
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


def _forget(descriptor: int, start: int, end: int) -> None:
    if hasattr(os, "posix_fadvise"):  # absent on macOS
        with suppress(OSError):  # some file systems know no such advice
            os.posix_fadvise(descriptor, max(0, start), end - start, os.POSIX_FADV_DONTNEED)


class WriteBehind:
    """Brings what is written to a large file to the disk while the file grows, and lets the system drop it.

    ``size`` is the size that the file will have; nothing is done for one that is not large.
    """

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._start = file, 0
        self._pool = ThreadPoolExecutor(max_workers=1) if size > large_bytes() else None
        self._descriptor = os.dup(file.fileno()) if self._pool is not None else -1  # stays valid if the file is closed early
        self._flush: Future[None] | None = None

    def wrote(self) -> None:
        """Note that something was written. Raises OSError if what was written before cannot reach the disk."""
        if self._pool is None:
            return
        end = self._file.tell()
        if abs(end - self._start) < _FLUSHED_BYTES:
            return
        self._wait()
        self._file.flush()
        self._flush = self._pool.submit(self._to_disk, *sorted((self._start, end)))
        self._start = end

    def _to_disk(self, start: int, end: int) -> None:
        getattr(os, "fdatasync", os.fsync)(self._descriptor)  # macOS has only the latter
        _forget(self._descriptor, start - _LARGEST_PIECE, end)

    def _wait(self) -> None:
        if self._flush is not None:
            flush, self._flush = self._flush, None
            flush.result()

    def close(self) -> None:
        """Wait for the disk. Raises OSError like ``wrote``."""
        if self._pool is not None:
            try:
                self._wait()
            finally:
                self._pool.shutdown()
                self._pool = None
                os.close(self._descriptor)
