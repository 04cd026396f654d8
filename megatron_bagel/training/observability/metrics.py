# SPDX-License-Identifier: Apache-2.0
"""The record of a logged step, which every logger writes under the same names, and the rates in it.

Losses are averages over the step's global batch. Rates are over the wall clock since the last logged step. The learning rate is
the one that the step used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_bagel.costs.flops import utilization
from megatron_bagel.training.step_result import StepDone


@dataclass(frozen=True)
class WindowRates:
    """Rates since the last logged step; ``step_time_s`` is the mean over the steps since then."""

    step_time_s: float
    tokens_per_s: float
    tflops: float
    mfu: float
    work_tflops: float
    work_mfu: float


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``: the numbers of a step, and what is measured when it is logged.

    Attributes:
        done: The step, with its result and the run's counters.
        rates: The rates over all steps since the last logged one. ``tflops`` and ``mfu`` follow the original's formula; ``work_tflops``
            and ``work_mfu`` count the work actually done (``costs/flops.py``). All four are over all devices.
        peak_mem_bytes: The largest memory that this rank has used.
        by_dataset: The step's losses by ``ce/<group>``, ``ce/<group>/<dataset>`` and the same of ``mse``.
        observed: Times, memory and the composition of the batch (``step_stats.py``).
    """

    done: StepDone
    rates: WindowRates
    peak_mem_bytes: int
    by_dataset: Mapping[str, float] = field(default_factory=dict)
    observed: Mapping[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Return the number of the logged step."""
        return self.done.step

    def values(self) -> dict[str, int | float]:
        """Return all numbers by their names in the log.

        Units are seconds, bytes and TFLOP/s. Counts ``step_...`` are of the step's global batch, without padding.
        """
        result, counters, rates = self.done.result, self.done.counters, self.rates
        return {
            "step": self.step,
            "loss": result.losses.loss,
            "ce": result.losses.ce,
            "mse": result.losses.mse,
            "grad_norm": result.outcome.grad_norm,
            "lr": result.lr,
            "consumed_samples": counters.samples,
            "consumed_tokens": counters.tokens,
            "ce_tokens": result.totals.ce_tokens,
            "mse_tokens": result.totals.mse_tokens,
            "step_time_s": rates.step_time_s,
            "tokens_per_s": rates.tokens_per_s,
            "tflops": rates.tflops,
            "mfu": rates.mfu,
            "peak_mem_bytes": self.peak_mem_bytes,
            "step_tokens": result.work.tokens,
            "step_samples": result.samples,
            "work_tflops": rates.work_tflops,
            "work_mfu": rates.work_mfu,
            "skipped_samples": counters.skipped,
            "bad_steps": counters.bad_steps,
            **self.by_dataset,
            **self.observed,
        }

    def as_json(self) -> dict[str, int | float | None]:
        """Return the numbers at full precision. JSON has no NaN or infinity: they become null, and readers show a gap."""
        return jsonable(self.values())


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with None for NaN and infinity, which JSON does not have."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def log_line(metrics: StepMetrics) -> str:
    """Return the original's console line, including the trailing comma and space. The logger adds the time."""
    losses, rates = metrics.done.result.losses, metrics.rates
    steps_per_s = 1.0 / rates.step_time_s if rates.step_time_s > 0 else 0.0
    return (
        f"(step={metrics.step:07d}) Train Loss mse: {losses.mse:.4f}, Train Loss ce: {losses.ce:.4f}, "
        f"Train Steps/Sec: {steps_per_s:.2f}, Tokens/Sec: {rates.tokens_per_s / 1000:.2f}k, MFU: {rates.mfu * 100:.1f}%, "
    )


class RateWindow:
    """Sums tokens and operations between two log lines. It counts the steps itself, so that the rates of the first window are right.

    ``add`` takes numbers of all ranks, so a window needs no communication.
    """

    def __init__(self, peak_tflops_per_device: float, devices: int) -> None:
        self._peak, self._devices = peak_tflops_per_device, devices
        self.restart()

    def restart(self) -> None:
        """Start a new window now."""
        self._start_time = time.perf_counter()
        self._steps = self._tokens = 0
        self._mfu_flops = self._work_flops = 0.0

    @property
    def steps(self) -> int:
        """Return the number of steps since the last log line."""
        return self._steps

    def add(self, tokens: int, mfu_flops: float, work_flops: float) -> None:
        """Count one optimizer step."""
        self._steps += 1
        self._tokens += tokens
        self._mfu_flops += mfu_flops
        self._work_flops += work_flops

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the time within the block out of the rates, for a checkpoint or an evaluation."""
        start_time = time.perf_counter()
        yield
        self._start_time += time.perf_counter() - start_time

    def close(self) -> WindowRates:
        """Return the rates of the window and start the next one. Raises ValueError if no step was counted."""
        if not self._steps:
            raise ValueError("no step was counted since the last log line")
        seconds = max(time.perf_counter() - self._start_time, 1e-9)
        tflops, mfu = utilization(self._mfu_flops, seconds, self._peak, self._devices)
        work_tflops, work_mfu = utilization(self._work_flops, seconds, self._peak, self._devices)
        rates = WindowRates(seconds / self._steps, self._tokens / seconds, tflops, mfu, work_tflops, work_mfu)
        self.restart()
        return rates
