# SPDX-License-Identifier: Apache-2.0
"""How long work takes on this process's device, measured without waiting for the device while it works.

A GPU runs behind the program that feeds it, so the program's clock would time the feeding. These stopwatches put marks (CUDA events)
into the GPU's queue and read them later, which needs no wait once the work is done. On CPUs the program is the device.
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
        """End the latest interval."""

    def read(self) -> float:
        """Return the seconds since the last reading and reset to zero. Waits for the device to finish the last interval."""


class HostStopwatch:
    """Reads the program's clock: exact on CPUs. Of a GPU it sees only the time that the program waits."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._total = self._start_time = 0.0

    def start(self) -> None:
        """Begin an interval."""
        self._start_time = self._clock()

    def stop(self) -> None:
        """End the interval that was begun last."""
        self._total += self._clock() - self._start_time

    def read(self) -> float:
        """Return the seconds since the last reading, and start again from zero."""
        total, self._total = self._total, 0.0
        return total


class CudaStopwatch:
    """Puts marks into the current CUDA stream. It reads the pairs in bulk, so that a run that seldom logs does not pile them up."""

    _MAX_PAIRS = 512

    def __init__(self) -> None:
        self._total = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin an interval."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self._pairs.append((begin, end))

    def stop(self) -> None:
        """End the interval that was begun last."""
        self._pairs[-1][1].record()
        if len(self._pairs) >= self._MAX_PAIRS:
            self._collect()

    def read(self) -> float:
        """Return the seconds since the last reading, and start again from zero."""
        self._collect()
        total, self._total = self._total, 0.0
        return total

    def _collect(self) -> None:
        if self._pairs:
            self._pairs[-1][1].synchronize()
        self._total += sum(begin.elapsed_time(end) for begin, end in self._pairs) / 1000
        self._pairs.clear()


def device_stopwatch() -> Stopwatch:
    """Return a stopwatch for work on this process's device."""
    return CudaStopwatch() if has_gpu() else HostStopwatch()
