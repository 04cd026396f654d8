# SPDX-License-Identifier: Apache-2.0
"""Whether a folder or a file can be written, found out before any work is done for it, and what to say when it is found out later."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Errors of the system that the user can resolve: a disk is full, or a file or folder is not accessible.
ABOUT_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def nearest_folder(folder: str | Path) -> Path:
    """Return ``folder``, or the nearest path above it that exists."""
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    return existing


def check_writable(folder: str | Path, flag: str) -> None:
    """Check that files can be written into ``folder``, or into the nearest folder above it where it does not exist yet.

    A file is written and removed again: permissions alone do not tell of a full disk or a file system that is mounted read-only. The file
    has no name where the system allows that, so that a process killed meanwhile leaves nothing.

    Args:
        folder: The folder, which need not exist.
        flag: The flag that names it, for the message.

    Raises:
        ValueError: It cannot be written.
    """
    existing = nearest_folder(folder)
    if not existing.is_dir():
        raise ValueError(f"{flag} {folder} cannot be written: {existing} is not a folder; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=".writable-") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written ({error.strerror or error}, found in {existing}); choose another folder, or make this one "
            "writable"
        ) from error


def check_writable_file(path: str | Path, flag: str) -> None:
    """Check that ``path`` can be written as a file. An existing file stays as it is, because only the result replaces it.

    Args:
        path: The file, which need not exist. Its folder must.
        flag: The flag that names it, for the message.

    Raises:
        ValueError: It cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path} cannot be written: there is no folder {path.parent}; make it, or choose another file")
    if path.is_dir():
        raise ValueError(f"{flag} {path} cannot be written: it is a folder; name a file")
    if not path.exists():
        check_writable(path.parent, f"{flag} {path}: the folder")
        return
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(
            f"{flag} {path} cannot be written ({error.strerror or error}); choose another file, or make it writable"
        ) from error


@contextmanager
def writing_to(folder: str | Path, flag: str) -> Iterator[None]:
    """Raise ValueError in place of an error of the system that says that a disk is full, or that a file cannot be written.

    A write to a full disk says neither which file it was for nor what to do.

    Args:
        folder: The folder that the block writes into.
        flag: The flag that names it, for the message.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in ABOUT_DISKS:
            raise
        where = f"{flag} {folder}" + (f": {error.filename}" if error.filename else "")
        raise ValueError(
            f"{where} cannot be written ({error.strerror}); make room or make it writable, and run the same command again"
        ) from error
