# SPDX-License-Identifier: Apache-2.0
"""What a killed process has started does not outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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

POOL = """
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from megatron_bagel.platform.launch.child_processes import end_with_client, end_with_parent

if __name__ == "__main__":
    with ProcessPoolExecutor(1, get_context({method!r}), {start}) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        input()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can tell a child of its parent's end")
@pytest.mark.parametrize(
    "program",
    [
        PROGRAM,
        POOL.format(method="forkserver", start="end_with_client"),
        POOL.format(method="fork", start="end_with_parent, (os.getpid(),)"),
    ],
)
def test_children_end_with_a_killed_process(program: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "program.py")]
    parent = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
