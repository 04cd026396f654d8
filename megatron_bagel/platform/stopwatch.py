"""How long work takes on this process's device, without waiting for the device while it works.

A GPU runs behind the program that feeds it, so a clock read there would time the feeding. Marks are put into its queue instead (CUDA
events) and read when somebody asks, which waits for nothing once the work is done. On CPU the program is the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from megatron_bagel.platform.device import has_gpu


class Stopwatch(Protocol):
    """Adds up the time between ``start`` and ``stop``."""

    def start(self) -> None:
        """Begin an interval."""

    def stop(self) -> None:
        """End the interval that was begun last."""

    def read(self) -> float:
        """Seconds since the last reading, and start again from zero. Waits for the device if the last interval is not over there."""


class HostStopwatch:
    """Reads the clock of the program: exact on CPU; of a GPU it sees only what the program waits for."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._total = self._began = 0.0

    def start(self) -> None:
        self._began = self._clock()

    def stop(self) -> None:
        self._total += self._clock() - self._began

    def read(self) -> float:
        total, self._total = self._total, 0.0
        return total


class CudaStopwatch:
    """Marks in the current CUDA stream. Pairs are read in bulk, so that a run that seldom logs does not collect them without end."""

    _MOST = 512

    def __init__(self) -> None:
        self._total = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._pairs.append((begin, end))

    def stop(self) -> None:
        self._pairs[-1][1].record()
        if len(self._pairs) >= self._MOST:
            self._collect()

    def read(self) -> float:
        self._collect()
        total, self._total = self._total, 0.0
        return total

    def _collect(self) -> None:
        if self._pairs:
            self._pairs[-1][1].synchronize()
        self._total += sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000
        self._pairs.clear()


def device_stopwatch() -> Stopwatch:
    """One for work on this process's device."""
    return CudaStopwatch() if has_gpu() else HostStopwatch()
