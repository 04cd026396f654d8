# SPDX-License-Identifier: Apache-2.0
"""A rank that hangs is named by the others, with what they wait in; nothing but a hang ends a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_bagel.platform.launch.process_group import side_store
from megatron_bagel.training.resilience.hang_watchdog import EXIT_CODE, Beat, Limits, Watchdog, hang_report, stack_position, watching
from tests.distributed import run_ranks
from tests.waiting import eventually

LIMITS = Limits(step=9, slow=600)
#: What the first rank ends with that ends: by its own watchdog, or because one that did so closed their connection.
ENDED = f"exit code {EXIT_CODE}|[Cc]onnection (closed|reset) by peer"


def _hang(folder: Path, how: str) -> None:
    """Rank 1 stops, or sleeps outside of any exchange, while the others wait for it in one."""
    with watching(side_store("watchdog"), LIMITS, folder) as watchdog:
        dist.barrier()
        watchdog.progress(41)
        if dist.get_rank() == 1:
            eventually(lambda: watchdog._read()[1].step == 41)
            os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(600)
        dist.all_reduce(torch.zeros(1))


def _report(folder: Path) -> str:
    (path,) = (folder / "errors").glob("hang-step-0000041.txt")
    return path.read_text()


@pytest.mark.distributed
def test_a_stopped_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=ENDED):
        run_ranks(_hang, 3, tmp_path, "stopped")
    text = _report(tmp_path)
    assert "rank 1 (" in text and "does not answer" in text and "Its last beat was in step 41" in text
    assert "ranks 0, 2 are in step 41, in all_reduce" in text


@pytest.mark.distributed
def test_a_rank_that_is_elsewhere_is_pointed_out(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=ENDED):
        run_ranks(_hang, 3, tmp_path, "asleep")
    text = _report(tmp_path)
    assert "does not answer" not in text
    assert "rank 1 is in step 41, in _hang" in text and "look here first" in text
    assert "ranks 0, 2 are in step 41, in all_reduce" in text


def _long_phases(folder: Path) -> list[int]:
    """Codes that the watchdog would have ended the process with."""
    ended: list[int] = []
    watchdog = Watchdog(side_store("watchdog"), 0, 1, Limits(step=1.2, slow=600), folder, ended.append)
    watchdog.start()
    time.sleep(3)  # set-up and the first step
    watchdog.progress(1)
    with watchdog.slow("a save"):
        time.sleep(3)
    quiet = list(ended)
    watchdog.progress(2)
    eventually(lambda: ended)
    watchdog.close()
    return [*quiet, -1, *ended[:1]]


@pytest.mark.distributed
def test_set_up_and_saves_may_take_longer_than_steps(tmp_path: Path) -> None:
    assert run_ranks(_long_phases, 1, tmp_path) == [[-1, EXIT_CODE]]


def _beat(count: int, call: str = "all_reduce", step: int = 7) -> Beat:
    return Beat(count, step, 1.0, "", "megatron_bagel/training/step.py:1 f", call, "host", 1)


def test_an_exchange_that_all_are_in_is_blamed_on_the_network() -> None:
    assert "look at the network" in hang_report({0: _beat(3), 1: _beat(4)}, [], 60)
    assert "look at the network" not in hang_report({0: _beat(3), 1: _beat(4)}, [1], 60)
    assert "look at the network" not in hang_report({0: _beat(3), 1: _beat(4, "read")}, [], 60)


def test_the_place_of_a_thread_is_its_line_in_this_package() -> None:
    from megatron_bagel.data.keyed_random import mix64

    ready, leave = threading.Event(), threading.Event()

    class Waits:
        def astype(self, kind: type, copy: bool) -> np.ndarray:
            ready.set()
            leave.wait(60)
            return np.zeros(1, kind)

    thread = threading.Thread(target=mix64, args=(Waits(),))
    thread.start()
    assert ready.wait(60)
    place, call = stack_position(thread.ident)
    leave.set()
    thread.join()
    assert place.startswith("megatron_bagel/data/keyed_random.py:") and call == "wait"
