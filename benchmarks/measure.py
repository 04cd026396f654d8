# SPDX-License-Identifier: Apache-2.0
"""Clocks and counters: median times, operator calls, and what the machine's own matrix products reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bagel import platform
from megatron_bagel.platform.device import synchronize


class Stopwatch:
    """Times named phases of a repeated piece of work; ``skip`` first rounds are warm-up. ``clock`` returns seconds."""

    def __init__(self, skip: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._skip, self._round, self._clock = skip, 0, clock
        self._seconds: dict[str, list[float]] = {}
        self._last = clock()

    def start(self) -> None:
        """Begin a round."""
        synchronize()
        self._round += 1
        self._last = self._clock()

    def lap(self, phase: str) -> None:
        """End a phase that began at the last lap (or start)."""
        synchronize()
        now = self._clock()
        if self._round > self._skip:
            self._seconds.setdefault(phase, []).append(now - self._last)
        self._last = now

    def medians(self) -> dict[str, float]:
        """Median seconds of every phase."""
        return {phase: statistics.median(seconds) for phase, seconds in self._seconds.items()}

    def rounds(self) -> list[float]:
        """Whole seconds of every counted round."""
        return [sum(parts) for parts in zip(*self._seconds.values(), strict=True)]


class NoLaps:
    """Stands in for a ``Stopwatch`` where nothing waits for the device between the phases."""

    def start(self) -> None:
        """Do nothing."""

    def lap(self, phase: str) -> None:
        """Do nothing."""


def seconds_each(work: Callable[[], object], rounds: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Mean seconds of ``rounds`` calls of ``work`` in a row, by one reading before and one after all of them."""
    synchronize()
    start = clock()
    for _ in range(rounds):
        work()
    synchronize()
    return (clock() - start) / rounds


def alternating_seconds(
    first: Callable[[], None], second: Callable[[], None], rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> tuple[list, list]:
    """Seconds of both by ``clock``, taken in turns, so that a slow moment of the machine hits them alike."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + warmup):
        for work, taken in zip((first, second), seconds, strict=True):
            synchronize()
            start = clock()
            work()
            synchronize()
            if number >= warmup:
                taken.append(clock() - start)
    return seconds


@dataclass
class OperatorCalls:
    """Calls that reach a backend. ``kernels`` leaves out views, which launch nothing."""

    total: int = 0
    kernels: int = 0


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = OperatorCalls()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        returns = func._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        self.calls.total += 1
        self.calls.kernels += not view
        return func(*args, **(kwargs or {}))


def count_operators(work: Callable[[], None]) -> OperatorCalls:
    """Operator calls of ``work``, backward pass included if it runs one."""
    with _Counter() as counter:
        work()
    return counter.calls


def matmul_gflops(rows: int, inner: int, columns: int, seconds: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s of this machine on one matrix product of a layer's size: what linears could reach at best."""
    device = platform.device()
    a, b = torch.randn(rows, inner, dtype=dtype, device=device), torch.randn(inner, columns, dtype=dtype, device=device)
    taken: list[float] = []
    a @ b
    while sum(taken) < seconds or len(taken) < 3:
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        taken.append(time.perf_counter() - start)
    return 2.0 * rows * inner * columns / statistics.median(taken) / 1e9
