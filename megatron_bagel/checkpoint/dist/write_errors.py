# SPDX-License-Identifier: Apache-2.0
"""What torch's errors of a failed write say, without the tracebacks that are part of their text, and what to do about a full disk."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from megatron_bagel.checkpoint.dist import step_folders

_SHARED_MEMORY = Path("/dev/shm")
_LITTLE_SHARED_MEMORY = 1024 * 1024
#: Bytes. A disk with less is as good as full: a part of a save's files may have been written and removed again.
_LITTLE_DISK = 64 * 1024 * 1024


def write_reasons(error: BaseException) -> str:
    """Return the reason of each rank that failed, once and in one line each, or that of ``error`` itself."""
    reasons = (str(failure) for failure in _failures(error))
    return "; ".join(dict.fromkeys(reason.strip().partition("\n")[0] for reason in reasons))


def source_error(error: BaseException) -> ValueError | None:
    """Return the error of what was to be written, which says itself what to do; None if the writing failed."""
    return next((failure for failure in _failures(error) if isinstance(failure, ValueError)), None)


def _failures(error: BaseException) -> list[BaseException]:
    failures = getattr(error, "failures", None) or {0: error}  # of a CheckpointException: rank -> (error, stack)
    return [failure[0] if isinstance(failure, tuple) else failure for failure in failures.values()]


def space_advice(disk_free: int, shared_memory: Path = _SHARED_MEMORY) -> str:
    """Return which full folder ended a save, and what to do.

    The processes that write keep their semaphores in ``shared_memory``, so a save may fail while its own disk has room.

    Args:
        disk_free: Free bytes of the disk that holds the checkpoints.
        shared_memory: The folder of shared memory.
    """
    if disk_free >= _LITTLE_DISK and shared_memory.is_dir():
        shared_free = shutil.disk_usage(shared_memory).free
        if shared_free < _LITTLE_SHARED_MEMORY:
            return (
                f"{shared_memory}, which the writing processes need, has {shared_free / 1e6:.1f} MB free); make room there "
                "(docker run --ipc host, or --shm-size) and start again"
            )
    return f"the disk has {disk_free / 1e6:.1f} MB free); free some space or choose another --checkpoint_dir and start again"


def is_space_short(free_bytes: int, newest_folder: Path | None, directory: Path, error: BaseException) -> bool:
    """Return whether a save may have failed because the disk, or the user's share of it, is full.

    torch does not always report the system's reason: a full disk may appear only as "unexpected pos". The room that a save needs is
    judged by the newest checkpoint, and by what the failed one has written.
    """
    reasons = [str(error), *map(str, (getattr(error, "failures", None) or {}).values())]
    if any(phrase in reason for reason in reasons for phrase in (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))):
        return True
    unfinished = [folder for folder in directory.glob(f"{step_folders.SAVING}*") if folder.is_dir()]
    sizes = [sum(path.stat().st_size for path in folder.glob("*")) for folder in [*unfinished, *([newest_folder] if newest_folder else [])]]
    return free_bytes < max([_LITTLE_DISK, *sizes])
