# SPDX-License-Identifier: Apache-2.0
"""A thread that waits for a lock in the memory of a library is seen, and no other thread."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from pathlib import Path

import pytest

from tests.faults.fake_clock import waits_inside

LOCK = """
#include <pthread.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
void take(void) { pthread_mutex_lock(&lock); }
void give(void) { pthread_mutex_unlock(&lock); }
"""


def test_a_wait_for_a_lock_of_the_library_is_seen(tmp_path: Path) -> None:
    if not Path("/proc/self/syscall").exists() or os.system("cc --version > /dev/null 2>&1"):
        pytest.skip("this needs Linux, a kernel that shows system calls, and a C compiler")
    (tmp_path / "lock.c").write_text(LOCK)
    library = tmp_path / "liblock.so"
    assert os.system(f"cc -shared -fPIC -o {library} {tmp_path / 'lock.c'} -lpthread") == 0
    lock = ctypes.CDLL(str(library))
    lock.take()
    waiting = threading.Thread(target=lock.take)
    waiting.start()
    other = threading.Event()
    threading.Thread(target=other.wait, daemon=True).start()
    until = time.monotonic() + 60
    while not (found := waits_inside(os.getpid(), str(library))) and time.monotonic() < until:
        time.sleep(0.01)
    assert {thread for thread, _ in found} == {waiting.native_id}
    lock.give()
    waiting.join()
    other.set()
    assert waits_inside(os.getpid(), str(library)) == set()
