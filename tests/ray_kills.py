# SPDX-License-Identifier: Apache-2.0
"""Commands whose Ray loses workers at random moments."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
#: On a busy machine Ray's workers, which have a low priority, would hardly run, and its server for clients would start too late.
WORKERS_IN_TURN = {"RAY_worker_niceness": "0", "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "600"}


def workers_of(driver: int, task: str) -> list[psutil.Process]:
    """The processes that are at work on a shard for a driver."""
    try:
        return [process for process in psutil.Process(driver).children(recursive=True) if task in " ".join(process.cmdline())]
    except psutil.Error:  # a process that has just ended
        return []


def run_and_kill(command: list[str], task: str, kills: int) -> int:
    """Run a command whose Ray loses workers at random moments. Returns how many were killed in the middle of a shard."""
    environment = {**os.environ, **WORKERS_IN_TURN}
    driver = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    killed, rng = 0, random.Random(0)
    while driver.poll() is None and killed < kills:
        time.sleep(rng.uniform(0.0, 0.5))
        if workers := workers_of(driver.pid, task):
            rng.choice(workers).kill()
            killed += 1
    output = driver.communicate(timeout=2000)[0]
    assert driver.returncode == 0, output
    return killed
