# SPDX-License-Identifier: Apache-2.0
"""Measures the time of each phase of a step, with one stopwatch per phase that is read when a step is logged.

Phases on the device are timed by events in its queue, the others by the host's clock, so timing never waits. With ``barrier``
(``--barrier_timers``) all ranks synchronise their devices and each other around every phase. A phase is then a rank's own work;
otherwise it includes the wait for slower ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_bagel.platform.device import synchronize
from megatron_bagel.platform.stopwatch import HostStopwatch, Stopwatch, device_stopwatch

#: Phases of every step, in order, on the device.
DEVICE_PHASES = ("encode", "forward_backward", "encode_backward", "grad_sync", "optimizer", "ema")
#: Phases on the host.
HOST_PHASES = ("data", "eval", "save")
PHASES = (*HOST_PHASES, *DEVICE_PHASES)
#: Phases that are not part of every step. Their seconds are summed over the steps since the last log line, not averaged.
RARE = ("eval", "save")


class Phases(Protocol):
    """The interface of timers that a step needs: ``with phases("encode"): ...``."""

    def __call__(self, phase: str) -> AbstractContextManager[None]: ...


class Timers:
    """Holds the stopwatches of this rank. Every phase also appears under its name in a profiler's trace."""

    def __init__(self, barrier: bool = False) -> None:
        self._barrier = barrier
        self._watches: dict[str, Stopwatch] = {phase: HostStopwatch() for phase in HOST_PHASES}
        self._watches |= {phase: device_stopwatch() for phase in DEVICE_PHASES}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block. All ranks enter the same phases in the same order."""
        watch = self._watches[phase]
        self._wait_for_all()
        watch.start()
        try:
            with torch.profiler.record_function(phase):
                yield
            if self._barrier:
                synchronize()
        finally:
            watch.stop()
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        if self._barrier:
            synchronize()
            dist.barrier()

    def read(self, steps: int) -> dict[str, float]:
        """Return the seconds of every phase since the last reading: the mean over ``steps`` steps, or the sum of a rare phase."""
        return {phase: watch.read() / (1 if phase in RARE else steps) for phase, watch in self._watches.items()}


@contextmanager
def untimed(phase: str) -> Iterator[None]:
    """Run a block without a timer."""
    del phase
    yield
