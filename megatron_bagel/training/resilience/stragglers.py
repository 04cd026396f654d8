"""Which ranks are slower than the others: each rank's own time of a step, without waiting for anyone, gathered rarely."""

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

_WORST = 5  # so many are named
_NOISE_S = 0.005


@dataclass(frozen=True)
class OwnTime:
    """Seconds of one rank in one step: waiting for data, and from the batch to its own gradients."""

    data: float
    compute: float

    @property
    def total(self) -> float:
        """Return the seconds of both."""
        return self.data + self.compute


@dataclass(frozen=True)
class StragglerSettings:
    """``every``: steps between measurements, 0 for none. ``factor``: a rank is slow above this many times the median's time."""

    every: int = 500
    factor: float = 1.3


class Stragglers(StepHook):
    """Measures every so many steps. The device is waited for before the gradient exchange of that step, and of no other.

    With tensor, pipeline or context parallelism a replica's ranks wait for each other inside a step, so a slow one shows as a slow replica.
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
        """Gather and name the slow ones. Collective over the world in measured steps."""
        if not self._measuring:
            return
        own = torch.tensor([self._data, self._compute], dtype=torch.float64, device=platform.device())
        times = torch.empty(2 * dist.get_world_size(), dtype=torch.float64, device=own.device)
        dist.all_gather_into_tensor(times, own)
        found = [OwnTime(*row) for row in times.view(-1, 2).tolist()]
        text = describe(found, self._factor)
        if text:
            slowest = max(range(len(found)), key=lambda rank: found[rank].total)
            self._events.write(done.step, "straggler", text, {"rank": slowest, "seconds": found[slowest].total})


def describe(times: Sequence[OwnTime], factor: float) -> str:
    """The slow ranks, slowest first; empty when there are none."""
    usual = median(time.total for time in times)
    slow = [rank for rank, time in enumerate(times) if time.total > factor * usual and time.total > usual + _NOISE_S]
    slow.sort(key=lambda rank: -times[rank].total)
    if not slow:
        return ""
    named = [f"rank {rank} {times[rank].total:.3f} s ({times[rank].data:.3f} of them waiting for data)" for rank in slow]
    return f"slow ranks, of {len(times)} with a median of {usual:.3f} s of their own: {shorten(named, _WORST)}"
