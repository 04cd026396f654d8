# SPDX-License-Identifier: Apache-2.0
"""What torch's errors of a failed write say, without the tracebacks that are part of their text, and what to do about a full disk."""

from __future__ import annotations

import shutil
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_LITTLE_SHARED_MEMORY = 1024 * 1024
_LITTLE_DISK = 64 * 1024 * 1024


def write_reasons(error: BaseException) -> str:
    """Return the reason of each rank that failed, once and in one line each, or that of ``error`` itself."""
    failures = getattr(error, "failures", None) or {0: error}  # of a CheckpointException: rank -> (error, stack)
    reasons = (str(failure[0] if isinstance(failure, tuple) else failure) for failure in failures.values())
    return "; ".join(dict.fromkeys(reason.strip().partition("\n")[0] for reason in reasons))


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
