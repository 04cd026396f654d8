"""The record of a logged step, which every logger writes under the same names, and the rates in it.

Losses are averages over the step's global batch, rates are over the wall clock since the last logged step, and the learning
rate is the one the step used.
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
    """One line of ``metrics.jsonl``: the numbers of a step as they were made, and what is measured when the step is logged.

    Attributes:
        done: the step, with its result and the run's counters.
        rates: over all steps since the last logged one. ``tflops`` and ``mfu`` follow the original's formula, ``work_tflops`` and
            ``work_mfu`` count the work really done (costs/flops.py); all four are over all devices.
        peak_mem_bytes: the largest memory that this rank has used.
        by_dataset: ``ce/<group>``, ``ce/<group>/<dataset>`` and the same of ``mse``: the step's losses by what they are of.
        observed: how the steps went (step_stats.py).
    """

    done: StepDone
    rates: WindowRates
    peak_mem_bytes: int
    by_dataset: Mapping[str, float] = field(default_factory=dict)
    observed: Mapping[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of the logged step."""
        return self.done.step

    def values(self) -> dict[str, int | float]:
        """All numbers by their names in the log. Seconds, bytes and TFLOP/s; ``step_`` counts are of the step's global batch, without
        padding."""
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
        """The same at full precision. JSON has no NaN or infinity: they become null, and readers show a gap."""
        return jsonable(self.values())


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, with None for those JSON cannot say: NaN and infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def log_line(metrics: StepMetrics) -> str:
    """The original's console line, trailing comma and space included; the time stamp is the logger's."""
    losses, rates = metrics.done.result.losses, metrics.rates
    steps_per_s = 1.0 / rates.step_time_s if rates.step_time_s > 0 else 0.0
    return (
        f"(step={metrics.step:07d}) Train Loss mse: {losses.mse:.4f}, Train Loss ce: {losses.ce:.4f}, "
        f"Train Steps/Sec: {steps_per_s:.2f}, Tokens/Sec: {rates.tokens_per_s / 1000:.2f}k, MFU: {rates.mfu * 100:.1f}%, "
    )


class RateWindow:
    """Sums tokens and operations between two log lines; counts the steps it really saw, so that the first window is right too.

    ``add`` takes global figures (all ranks), so every rank could keep one without talking to the others.
    """

    def __init__(self, peak_tflops_per_device: float, devices: int) -> None:
        self._peak, self._devices = peak_tflops_per_device, devices
        self.restart()

    def restart(self) -> None:
        """Begin a window now."""
        self._since = time.perf_counter()
        self._steps = self._tokens = 0
        self._mfu_flops = self._work_flops = 0.0

    @property
    def steps(self) -> int:
        """Steps counted since the last log line."""
        return self._steps

    def add(self, tokens: int, mfu_flops: float, work_flops: float) -> None:
        """Count one optimizer step."""
        self._steps += 1
        self._tokens += tokens
        self._mfu_flops += mfu_flops
        self._work_flops += work_flops

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave the time within the block out: it was not training (a checkpoint, sample images)."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def close(self) -> WindowRates:
        """Rates of the window, and start the next one. Raises ValueError if no step was counted."""
        if not self._steps:
            raise ValueError("no step was counted since the last log line")
        seconds = max(time.perf_counter() - self._since, 1e-9)
        tflops, mfu = utilization(self._mfu_flops, seconds, self._peak, self._devices)
        work_tflops, work_mfu = utilization(self._work_flops, seconds, self._peak, self._devices)
        rates = WindowRates(seconds / self._steps, self._tokens / seconds, tflops, mfu, work_tflops, work_mfu)
        self.restart()
        return rates
