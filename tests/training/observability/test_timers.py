"""Timers of a step's phases: what they add up, that they line ranks up only when asked, and that they cost next to nothing."""

from __future__ import annotations

import time

import pytest

from megatron_bagel.platform.stopwatch import HostStopwatch
from megatron_bagel.training.observability.timers import PHASES, RARE, Timers
from tests.distributed import run_ranks


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


def test_phases_are_means_over_steps_and_rare_ones_sums() -> None:
    timers = Timers()
    for _ in range(2):
        with timers("optimizer"):
            time.sleep(0.02)
        with timers("save"):
            time.sleep(0.02)
    read = timers.read(steps=2)
    assert set(read) == set(PHASES) and read["optimizer"] >= 0.02 and read["save"] >= 0.04
    assert [phase for phase, seconds in read.items() if seconds] == ["save", "optimizer"]
    assert set(RARE) < set(PHASES)


def test_an_error_inside_a_phase_keeps_the_timer_usable() -> None:
    timers = Timers()
    with pytest.raises(ZeroDivisionError), timers("encode"):
        raise ZeroDivisionError
    with timers("encode"):
        pass
    assert timers.read(1)["encode"] > 0


def _two_phases(meet: bool) -> dict[str, float]:
    """Rank 1 is slow in the first phase; in the second, rank 0 waits for nobody unless they meet."""
    import torch.distributed as dist

    timers = Timers(meet)
    with timers("encode"):
        time.sleep(0.5 * dist.get_rank())
    with timers("grad_sync"):
        dist.barrier()
    return timers.read(1)


@pytest.mark.distributed
@pytest.mark.parametrize("meet", [False, True])
def test_ranks_meet_only_when_asked(meet: bool) -> None:
    """The wait for the slow rank shows as the fast rank's next phase, or, where they meet, in none."""
    fast, slow = run_ranks(_two_phases, 2, meet)
    assert slow["encode"] >= 0.5
    assert (fast["grad_sync"] >= 0.25) != meet, (fast, slow)
