# SPDX-License-Identifier: Apache-2.0
"""What a killed process has forked does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT

PROGRAM = """
import multiprocessing, os, time
from megatron_bagel.platform.launch.child_processes import end_forks_with_this_process

end_forks_with_this_process()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
child.start()
print(child.pid, flush=True)
child.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can tell a child of its parent's end")
def test_forks_end_with_a_killed_process() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
