# SPDX-License-Identifier: Apache-2.0
"""Writes files larger than memory can keep straight to the disk, past the system's page cache.

The cache would keep all of a large file, push other files out, and search for new pages all the time, which costs a virtual machine more
than the disk does. Direct writes (O_DIRECT) take their bytes from memory that is used again, and run while the caller goes on.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, cast

import numpy as np

from megatron_bagel.common.page_cache import large_bytes

#: Place and size of a direct write are multiples of the disk's blocks. No disk has larger ones than a page.
_BLOCK = 4096
_BUFFER_BYTES = 1 << 26  # a multiple of _BLOCK
_NUM_BUFFERS = 2  # one is filled while the other is written


def open_to_write(path: str | os.PathLike[str], size: int) -> IO[bytes]:
    """Open a new file of ``size`` bytes, or about that, to write it from start to end; other places may be sought, which is slower.

    A large file, or one of several that are large together (``size`` is then that of all), does not pass the page cache, where system and
    disk can do without.
    """
    file = open(path, "wb")  # noqa: SIM115
    if size > large_bytes() and (descriptor := _open_direct(path)) is not None:
        return cast("IO[bytes]", DirectFile(file, descriptor))
    return file


def _open_direct(path: str | os.PathLike[str]) -> int | None:
    if not hasattr(os, "O_DIRECT"):  # absent on macOS
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:  # for example a file system in memory
        return None


class DirectFile:
    """A file object for ``file``, which is open for writing, and ``direct``, a descriptor of the same file with O_DIRECT.

    What is written waits in memory until it is some whole blocks. The parts of blocks at the start and the end of what was written
    together pass the page cache, so that no block does both. An error of the disk is raised by a later call, by ``flush`` at the latest.
    Who calls fsync before the file is closed need not flush: ``close`` calls it again.
    """

    def __init__(self, file: IO[bytes], direct: int) -> None:
        self._file, self._direct = file, direct
        self._buffers = [np.frombuffer(mmap.mmap(-1, _BUFFER_BYTES), np.uint8) for _ in range(_NUM_BUFFERS)]
        self._start, self._filled = 0, 0  # place in the file of what the first buffer holds, and its bytes
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._writing: list[Future[None]] = []

    @property
    def name(self) -> str:
        """Return the file's name."""
        return str(self._file.name)

    @property
    def closed(self) -> bool:
        """Return whether it was closed."""
        return self._file.closed

    def fileno(self) -> int:
        """Return the descriptor, for fsync."""
        return self._file.fileno()

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place of the next write."""
        return self._start + self._filled

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, counted in bytes from the start of the file."""
        if whence != os.SEEK_SET:
            raise ValueError("only places from the start of the file are supported")
        if place != self.tell():
            self.flush()
            self._start = place
        return place

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write ``data`` and return its number of bytes. Its memory may be used again at once."""
        content = np.frombuffer(data, np.uint8)
        written = 0
        while written < len(content):
            # A buffer ends where a block of the file ends.
            room = _BUFFER_BYTES - self._start % _BLOCK - self._filled
            piece = content[written : written + room]
            self._buffers[0][self._filled : self._filled + len(piece)] = piece
            self._filled += len(piece)
            written += len(piece)
            if len(piece) == room:
                self._hand_over()
        return len(content)

    def _hand_over(self) -> None:
        """Begin to write what the first buffer holds, and go on with a free one."""
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        self._writing.append(self._pool.submit(self._to_disk, buffer[: self._filled], self._start))
        self._start, self._filled = self._start + self._filled, 0
        if len(self._writing) == _NUM_BUFFERS:
            self._writing.pop(0).result()

    def _to_disk(self, content: np.ndarray, start: int) -> None:
        head = min(-start % _BLOCK, len(content))
        whole = (len(content) - head) // _BLOCK * _BLOCK
        self._write_at(self._file.fileno(), content[:head], start)
        if head:  # what follows must lie at a block's start in memory too
            content[: len(content) - head] = content[head:].copy()
        try:
            self._write_at(self._direct, content[:whole], start + head)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # A disk with larger blocks, or what is left of a write that ended inside one.
            self._write_at(self._file.fileno(), content[:whole], start + head)
        self._write_at(self._file.fileno(), content[whole : len(content) - head], start + head + whole)

    @staticmethod
    def _write_at(descriptor: int, content: np.ndarray, place: int) -> None:
        while len(content):
            num_bytes = os.pwrite(descriptor, content.data, place)
            content, place = content[num_bytes:], place + num_bytes

    def flush(self) -> None:
        """Wait until all that was written has reached the system. Raises OSError if it cannot."""
        if self._filled:
            self._hand_over()
        while self._writing:
            self._writing.pop(0).result()

    def close(self) -> None:
        """Flush, wait for the disk, and close. Raises OSError like ``flush``; the file is closed all the same."""
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            self._pool.shutdown()
            os.close(self._direct)
            self._file.close()

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
