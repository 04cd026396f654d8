"""Processes that a rank forks (readers of data, writers of checkpoints) end when the rank does, however it ends.

They share the rank's connections. If one outlived a rank that was killed, the other ranks would see an open connection and wait in their
exchange for good, instead of being told that the rank is gone.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_installed = False
_parent = 0


def end_forks_with_this_process() -> None:
    """From now on. Linux only, elsewhere nothing happens; programs started by name are not forks and live on."""
    global _installed
    if _installed or not sys.platform.startswith("linux"):
        return
    _installed = True
    libc = ctypes.CDLL(None, use_errno=True)

    def before() -> None:
        global _parent
        _parent = os.getpid()

    def in_child() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _parent:  # it ended before the call
            os._exit(1)

    os.register_at_fork(before=before, after_in_child=in_child)
