# SPDX-License-Identifier: Apache-2.0
"""Whatever goes wrong in a reading process ends the training process within seconds, with one sentence and its status."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT

#: Ranks that read data until something goes wrong, as programs. ``FAULT`` says what a picture does.
PROGRAM = """
import os, sys, time
import torch
from megatron_bagel.data.loading.loader import PackLoader, PackReader
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.platform.launch.signals import stop_on_signals
from tests.data.loading.test_loader import SPEC, Pictures

fault = sys.argv[1]

class Faulty(Pictures):
    def pixels(self, index, image):
        if fault == "raises":
            raise RuntimeError("Decoding of color planes failed")
        if fault == "refuses":
            raise TypeError("no such picture")
        if fault == "hangs":
            time.sleep(600)
        return super().pixels(index, image)

planner = Planner([Faulty()], PlannerConfig(90, 70, 60, 5, seed=1, global_batch_size=4))
loader = PackLoader(planner, PackReader([Faulty()], SPEC, seed=9), num_workers=2)
with stop_on_signals() as request:
    loader.give_up_after(request, 2)
    print("starts", flush=True)
    try:
        for step in range(int(sys.argv[2])):
            batch = next(loader)
            if step == 0:
                print("reads", flush=True)
                time.sleep(0.2)
    except Exception as error:
        kept = error  # an error report keeps the error, and with it everything on the stack
        print(f"{type(error).__name__}: {error}", flush=True)
        raise SystemExit(1)
print("done", flush=True)
loader.close()
"""


def start(fault: str, steps: int = 10**9, prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [*prefix, sys.executable, "-c", PROGRAM, fault, str(steps)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


#: Asks for reading processes with room for 1, 3, ... pages in /dev/shm.
SHORT_OF_ROOM = """
import os
from torch.utils.data import DataLoader
from megatron_bagel.data.loading.reading_process import check_semaphores
from megatron_bagel.platform.launch.child_processes import reading_context
from tests.faults.commands import mount_shared_memory

for pages in range(1, 13, 2):
    if os.fork():
        os.wait()
        continue
    mount_shared_memory(4096 * pages)
    try:
        check_semaphores(reading_context(), 2)
        iter(DataLoader([1], num_workers=2, multiprocessing_context=reading_context()))
    except OSError as error:
        print(f"OSError: {error}", flush=True)
    os._exit(0)
"""


def end(process: subprocess.Popen) -> tuple[int, list[str]]:
    """The exit status and what was printed. A process that does not end is killed with its children and fails the test."""
    try:
        printed, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise
    return process.returncode, printed.splitlines()


@pytest.mark.parametrize("fault", ["raises", "refuses"])
def test_an_error_ends_the_run_with_its_sentence(fault: str) -> None:
    status, printed = end(start(fault))
    texts = {"raises": "RuntimeError: Decoding of color planes failed", "refuses": "TypeError: no such picture"}
    assert status == 1
    assert printed == ["starts", f"ReadingError: a process that reads data failed: {texts[fault]}"]


def test_a_killed_process_ends_the_run() -> None:
    process = start("none")
    assert process.stdout.readline() == "starts\n" and process.stdout.readline() == "reads\n"
    psutil.Process(process.pid).children()[0].kill()
    status, printed = end(process)
    assert status == 1
    assert "is killed by signal" in printed[-1] or "exited unexpectedly" in printed[-1] or "cannot be opened" in printed[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_wait_for_data_that_do_not_come(number: signal.Signals) -> None:
    process = start("hangs")
    assert process.stdout.readline() == "starts\n"
    time.sleep(1)
    process.send_signal(number)
    status, printed = end(process)
    assert status == 1
    assert printed[-1].startswith(f"ReadingError: {number.name} asks to stop, and no data came within 2 s of it")


def test_a_small_dev_shm_is_enough() -> None:
    """64 KB hold the semaphores of the queues; the pictures need no room there."""
    small = ("unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "bash")
    if shutil.which("unshare") is None or subprocess.run([*small, "true"], capture_output=True).returncode:
        pytest.skip("a small /dev/shm needs a mount namespace, which is not permitted here")
    assert end(start("none", 40, small)) == (0, ["starts", "reads", "done"])


def test_a_dev_shm_without_room_for_semaphores_is_one_sentence() -> None:
    """Whichever semaphore finds no room: nothing is printed by an iterator of DataLoader that was never finished."""
    if os.geteuid() != 0:
        pytest.skip("a small /dev/shm needs root")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", SHORT_OF_ROOM], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["OSError: [Errno 28] No space left on device"] * 6
