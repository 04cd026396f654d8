# SPDX-License-Identifier: Apache-2.0
"""Files that exist whole or not at all, digests of files, and text read with an error that names its file."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from megatron_bagel.common.json_text import decode

_CHUNK = 1 << 22
_UNFINISHED = re.compile(r"\.[0-9a-f]{8}-(?P<host>.*)-(?P<process>[0-9]+)\..*", re.DOTALL)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class FileDigest(NamedTuple):
    """Size in bytes and hexadecimal SHA-256 of a file."""

    size: int
    sha256: str


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which becomes ``path`` when the block ends without an error.

    The bytes are on disk before the name is, so a power cut leaves the old file or the new one. The temporary name is unique per host
    and process, so several writers of one file cannot tear each other's; after an error it is removed.
    """
    # The ending stays: some writers choose their format by it.
    unfinished = path.with_name(f".{secrets.token_hex(4)}-{socket.gethostname()}-{os.getpid()}.{path.name}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def is_unfinished(name: str) -> bool:
    """Return whether a file name is one of ``replacing``: a process is writing the file, or was killed while it did."""
    return _UNFINISHED.fullmatch(name) is not None


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes of this host were writing in ``folder`` and below. Files of running processes and other hosts stay."""
    for leftover in folder.rglob(".*"):
        writer = _UNFINISHED.fullmatch(leftover.name)
        if writer and writer["host"] == socket.gethostname() and not process_exists(int(writer["process"])):
            leftover.unlink(missing_ok=True)


def process_exists(process: int) -> bool:
    """Return whether this host has a process of that number, running or not yet waited for."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it belongs to another user
        pass
    return True


def is_stray(name: str) -> bool:
    """Return whether a file name is one that other programs leave beside data: hidden files, checksums, markers, and backups.

    Examples are ``.DS_Store``, ``._photo.parquet``, ``.part.parquet.crc``, ``_SUCCESS``, and ``data.json~``.
    """
    return name.startswith((".", "~")) or name.endswith(("~", ".crc")) or name == "_SUCCESS"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file so that it exists whole or not at all.

    Args:
        path: Where the file appears; its folder must exist.
        content: Text, which is encoded as UTF-8, or bytes.
    """
    with replacing(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def digest(path: Path) -> FileDigest:
    """Return size and SHA-256 of a file, read in pieces. Raises OSError."""
    summed, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            summed.update(piece)
            size += len(piece)
    return FileDigest(size, summed.hexdigest())


def crc32(path: Path) -> int:
    """Return the CRC-32 of a file, read in pieces. It finds damage several times faster than SHA-256. Raises OSError."""
    summed = 0
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            summed = zlib.crc32(piece, summed)
    return summed


def refuse_lfs_pointer(path: Path, what: str) -> None:
    """Raise ValueError if ``path`` is the pointer that Git LFS leaves in place of a large file. ``what`` begins the message."""
    with path.open("rb") as file:
        _refuse_pointer(file.read(len(_LFS_POINTER)), path, what)


def _refuse_pointer(content: bytes, path: Path, what: str) -> None:
    if content.startswith(_LFS_POINTER):
        raise ValueError(f"{what}: {path} is a Git LFS pointer, not the file: run git lfs pull in its repository")


def read_bytes(path: Path, what: str) -> bytes:
    """Return the content of a small file.

    Args:
        path: The file.
        what: The flag or thing the file belongs to; error messages begin with it.

    Raises:
        ValueError: The file is absent, cannot be read, or is a Git LFS pointer.
    """
    if not path.is_file():
        raise ValueError(f"{what}: there is no file {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{what}: {path} cannot be read ({error.strerror or error})") from error
    _refuse_pointer(content, path, what)
    return content


def read_text(path: Path, what: str) -> str:
    """Return the text of a small UTF-8 file. Raises ValueError as ``read_bytes`` does, and if the file is not UTF-8."""
    content = read_bytes(path, what)
    try:
        return decode(content)
    except ValueError as error:
        raise ValueError(f"{what}: {path}: {error}") from error
