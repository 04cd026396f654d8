"""Where the time of a step goes: one stopwatch per phase, read when a step is logged.

Phases on the device are timed by marks in its queue, the others by the program's clock, so nothing waits while training. With
``meet`` (``--barrier_timers``) all ranks meet, with their devices idle, around every phase: a phase is then a rank's own work, where
it otherwise holds the wait for slower ranks too.
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
#: Phases that the program itself spends its time in.
HOST_PHASES = ("data", "eval", "save")
PHASES = (*HOST_PHASES, *DEVICE_PHASES)
#: Phases that are not part of every step: their seconds are summed over the steps since the last log line, not averaged.
RARE = ("eval", "save")


class Phases(Protocol):
    """What a step needs of timers: ``with phases("encode"): ...``."""

    def __call__(self, phase: str) -> AbstractContextManager[None]: ...


class Timers:
    """Stopwatches of this rank. Every phase also shows under its name in a profiler's trace."""

    def __init__(self, meet: bool = False) -> None:
        self._meet = meet
        self._watches: dict[str, Stopwatch] = {phase: HostStopwatch() for phase in HOST_PHASES}
        self._watches |= {phase: device_stopwatch() for phase in DEVICE_PHASES}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time a block. All ranks enter the same phases in the same order."""
        watch = self._watches[phase]
        self._line_up()
        watch.start()
        try:
            with torch.profiler.record_function(phase):
                yield
            if self._meet:
                synchronize()
        finally:
            watch.stop()
        self._line_up()

    def _line_up(self) -> None:
        if self._meet:
            synchronize()
            dist.barrier()

    def read(self, steps: int) -> dict[str, float]:
        """Seconds of every phase since the last reading: per step (of ``steps``), of the rare ones the sum."""
        return {phase: watch.read() / (1 if phase in RARE else steps) for phase, watch in self._watches.items()}


@contextmanager
def untimed(phase: str) -> Iterator[None]:
    """Stands in for timers where nobody reads them."""
    del phase
    yield
