# SPDX-License-Identifier: Apache-2.0
"""Finds ranks that are slower than the others. Each rank measures its time without waits for other ranks; it is gathered rarely."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from megatron_bagel import platform
from megatron_bagel.common.wording import shorten
from megatron_bagel.platform.device import synchronize
from megatron_bagel.training.hooks import StepHook
from megatron_bagel.training.resilience.events import EventFile
from megatron_bagel.training.step_result import StepDone

_MAX_SHOWN = 5  # slow ranks that an event names
_NOISE_S = 0.005


@dataclass(frozen=True)
class OwnTime:
    """The seconds of one rank in one step: waiting for data, and from the batch to its gradients."""

    data: float
    compute: float

    @property
    def total(self) -> float:
        """Return the sum of both."""
        return self.data + self.compute


@dataclass(frozen=True)
class StragglerSettings:
    """``every`` is the number of steps between measurements, 0 for none. A rank is slow above ``factor`` times the median time."""

    every: int = 500
    factor: float = 1.3


class Stragglers(StepHook):
    """Measures some steps. Only in these steps does a rank wait for its device before it exchanges gradients.

    With tensor, pipeline or context parallelism ranks of a replica wait for each other in a step, so the replica of a slow rank is slow.
    """

    def __init__(self, settings: StragglerSettings, events: EventFile) -> None:
        self._every, self._factor, self._events = settings.every, settings.factor, events
        self._measuring = False
        self._mark = self._data = self._compute = 0.0

    def before_step(self, step: int) -> None:
        self._measuring = bool(self._every) and step > 0 and step % self._every == 0 and dist.get_world_size() > 1
        self._mark = time.perf_counter()

    def data_loaded(self) -> None:
        self._data = time.perf_counter() - self._mark

    def batch_settled(self) -> None:
        self._mark = time.perf_counter()

    def gradients_ready(self) -> None:
        if self._measuring:
            synchronize()
            self._compute = time.perf_counter() - self._mark

    def after_step(self, done: StepDone) -> None:
        """Gather the times and report slow ranks. Collective over the world in measured steps."""
        if not self._measuring:
            return
        local_times = torch.tensor([self._data, self._compute], dtype=torch.float64, device=platform.device())
        all_times = torch.empty(2 * dist.get_world_size(), dtype=torch.float64, device=local_times.device)
        dist.all_gather_into_tensor(all_times, local_times)
        times = [OwnTime(*row) for row in all_times.view(-1, 2).tolist()]
        text = describe(times, self._factor)
        if text:
            slowest = max(range(len(times)), key=lambda rank: times[rank].total)
            self._events.write(done.step, "straggler", text, {"rank": slowest, "seconds": times[slowest].total})


def describe(times: Sequence[OwnTime], factor: float) -> str:
    """Name the slow ranks, slowest first; empty if there are none."""
    median_s = median(time.total for time in times)
    slow_ranks = [rank for rank, time in enumerate(times) if time.total > factor * median_s and time.total > median_s + _NOISE_S]
    slow_ranks.sort(key=lambda rank: -times[rank].total)
    if not slow_ranks:
        return ""
    parts = [f"rank {rank} {times[rank].total:.3f} s ({times[rank].data:.3f} s of it waiting for data)" for rank in slow_ranks]
    return f"slow ranks of {len(times)}, whose median time for a step is {median_s:.3f} s: {shorten(parts, _MAX_SHOWN)}"
