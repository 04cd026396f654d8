# SPDX-License-Identifier: Apache-2.0
"""Timers of a step's phases: what they add up, and that they line ranks up only when asked."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from megatron_bagel.platform.stopwatch import HostStopwatch
from megatron_bagel.training.observability import timers as timers_module
from megatron_bagel.training.observability.timers import PHASES, RARE, Timers
from tests.distributed import run_ranks
from tests.waiting import eventually


def test_a_stopwatch_adds_intervals_and_starts_again() -> None:
    now = iter([1.0, 3.0, 10.0, 10.5, 20.0, 21.0])
    watch = HostStopwatch(clock=lambda: next(now))
    for _ in range(2):
        watch.start()
        watch.stop()
    assert watch.read() == 2.5 and watch.read() == 0.0
    watch.start()
    watch.stop()
    assert watch.read() == 1.0


def test_phases_are_means_over_steps_and_rare_ones_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    for stopwatch in ("device_stopwatch", "HostStopwatch"):
        monkeypatch.setattr(timers_module, stopwatch, lambda: HostStopwatch(clock=lambda: float(next(ticks))))
    timers = Timers()
    for _ in range(2):
        with timers("optimizer"):
            pass
        with timers("save"):
            pass
    seconds = timers.read(steps=2)
    assert seconds == {**dict.fromkeys(PHASES, 0.0), "optimizer": 1.0, "save": 2.0}
    assert set(RARE) < set(PHASES)


def test_an_error_inside_a_phase_keeps_the_timer_usable() -> None:
    timers = Timers()
    with pytest.raises(ZeroDivisionError), timers("encode"):
        raise ZeroDivisionError
    with timers("encode"):
        pass
    assert timers.read(1)["encode"] > 0


def _two_phases(meet: bool, folder: Path) -> float:
    """Rank 1 works in the first phase; in the second, rank 0 waits for nobody unless they meet.

    The clock shows 0 until rank 1 has done its work, and 1 from then on. Returns how much of the second phase lay across that moment.
    """
    import torch.distributed as dist

    begun, done = folder / "rank-0-begun", folder / "rank-1-done"
    timers_module.device_stopwatch = lambda: HostStopwatch(clock=lambda: float(done.exists()))
    timers = Timers(meet)
    with timers("encode"):
        if dist.get_rank() == 1:
            if meet:
                time.sleep(0.2)  # rank 0 would be in its next phase by now if they did not meet
            else:
                eventually(begun.exists)
            done.touch()
    with timers("grad_sync"):
        if dist.get_rank() == 0:
            begun.touch()
        dist.barrier()
    return timers.read(1)["grad_sync"]


@pytest.mark.distributed
@pytest.mark.parametrize(("meet", "waited"), [(False, 1.0), (True, 0.0)])
def test_ranks_meet_only_when_asked(meet: bool, waited: float, tmp_path: Path) -> None:
    """The wait for the slow rank shows as the fast rank's next phase, or, where they meet, in none."""
    fast, slow = run_ranks(_two_phases, 2, meet, tmp_path)
    assert (fast, slow) == (waited, 0.0)
