# SPDX-License-Identifier: Apache-2.0
"""Ends the processes that a process starts (readers of data, writers of checkpoints, workers of a build) when it ends, for any reason.

Forks share the rank's connections. If a fork outlived a killed rank, the other ranks would see an open connection and wait in their
collective forever, instead of learning that the rank is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context, get_start_method, parent_process, popen_fork
from multiprocessing.process import BaseProcess

_PR_SET_PDEATHSIG = 1
_installed = False
_parent = 0


@contextmanager
def starting(processes: str, remedy: str) -> Iterator[None]:
    """Turn the system's error into a sentence if processes cannot be started: their semaphores need room in ``/dev/shm``.

    Args:
        processes: What is started, as a subject in the plural.
        remedy: How to do without.

    Raises:
        ValueError: The block met an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{processes} cannot be started: {error}. If /dev/shm is full or missing, make room there (docker run --ipc host, or "
            f"--shm-size); {remedy}"
        ) from error


def end_forks_with_this_process() -> None:
    """End all forks from now on with this process. Linux only; programs started by name are not forks and live on."""
    global _installed
    if _installed or not sys.platform.startswith("linux"):
        return
    _installed = True
    libc = ctypes.CDLL(None, use_errno=True)

    def remember_parent() -> None:
        global _parent
        _parent = os.getpid()

    def end_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:  # the parent ended before prctl
            os._exit(1)

    os.register_at_fork(before=remember_parent, after_in_child=end_with_parent)


def end_with_parent(parent: int) -> None:
    """End this process when ``parent``, the process that forked it, ends for any reason. Linux only.

    For workers of pools: a pool whose process is killed leaves its workers waiting for work forever.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before prctl
        os._exit(1)


def end_with_client() -> None:
    """End this fork of a server when the process that asked for it ends for any reason. The server itself lives as long as its forks."""
    client = parent_process()
    assert client is not None, "only a process that multiprocessing started has a client"

    def wait() -> None:
        client.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with client", daemon=True).start()


def reading_context() -> context.BaseContext | None:
    """Return the context of processes that read data, or None for the default one where processes are not forked.

    Python and torch end such processes with SIGTERM and then wait for them. Reading processes ignore SIGTERM
    (``signals.leave_signals_to_the_ranks``), so this context ends them with SIGKILL.
    """
    return _ReadingContext() if get_start_method() == "fork" else None


class _ReadingPopen(popen_fork.Popen):
    def terminate(self) -> None:
        self.kill()


class _ReadingProcess(context.ForkProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_fork.Popen:
        return _ReadingPopen(process_obj)


class _ReadingContext(context.ForkContext):
    Process = _ReadingProcess
