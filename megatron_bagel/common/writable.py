# SPDX-License-Identifier: Apache-2.0
"""Whether a folder can be written, found out before any work is done for it."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def check_writable(folder: str | Path, flag: str) -> None:
    """Check that files can be written into ``folder``, or into the nearest folder above it where it does not exist yet.

    A file is written and removed again: permissions alone do not tell of a full disk or a file system that is mounted read-only.

    Args:
        folder: The folder, which need not exist.
        flag: The flag that names it, for the message.

    Raises:
        ValueError: It cannot be written.
    """
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise ValueError(f"{flag} {folder} cannot be written: {existing} is not a folder; choose another folder")
    probe = existing / f".writable-{secrets.token_hex(8)}"
    try:
        try:
            with probe.open("wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"{flag} {folder} cannot be written ({error.strerror or error}, found in {existing}); choose another folder, or make this one "
            "writable"
        ) from error
