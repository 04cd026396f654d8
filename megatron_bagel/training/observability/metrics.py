"""The numbers of one optimizer step, measured once and written by every logger under the same names.

Losses are averages over the step's global batch, rates are over the wall clock since the last logged step, and the learning
rate is the one the step used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_bagel.costs.flops import utilization


@dataclass(frozen=True)
class StepMetrics:
    """One line of ``metrics.jsonl``. Seconds, bytes and TFLOP/s; token counts are of the step's global batch, without padding.

    ``tflops`` and ``mfu`` follow the original's formula, ``work_tflops`` and ``work_mfu`` count the work really done
    (costs/flops.py); both are over all devices. ``step_time_s`` is the mean over the steps since the last logged one.
    ``skipped_samples`` could not be read and were replaced, and ``bad_steps`` updates were left out, since the run began.
    ``by_dataset`` holds ``ce/<group>``, ``ce/<group>/<dataset>`` and the same of ``mse``: the step's losses by what they are of.
    ``observed`` holds how the step went (step_stats.py).
    """

    step: int
    loss: float
    ce: float
    mse: float
    grad_norm: float
    lr: float
    consumed_samples: int
    consumed_tokens: int
    ce_tokens: int
    mse_tokens: int
    step_time_s: float
    tokens_per_s: float
    tflops: float
    mfu: float
    peak_mem_bytes: int
    step_tokens: int = 0
    step_samples: int = 0
    work_tflops: float = 0.0
    work_mfu: float = 0.0
    skipped_samples: int = 0
    bad_steps: int = 0
    by_dataset: Mapping[str, float] = field(default_factory=dict)
    observed: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, int | float | None]:
        """Plain values at full precision, those of ``by_dataset`` and ``observed`` beside the others. JSON has no NaN or infinity:
        they become null, and readers show a gap."""
        values = asdict(self)
        values |= {**values.pop("by_dataset"), **values.pop("observed")}
        return jsonable(values)


def jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values, with None for those JSON cannot say: NaN and infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}


def log_line(metrics: StepMetrics) -> str:
    """The original's console line, trailing comma and space included; the time stamp is the logger's."""
    rate = 1.0 / metrics.step_time_s if metrics.step_time_s > 0 else 0.0
    return (
        f"(step={metrics.step:07d}) Train Loss mse: {metrics.mse:.4f}, Train Loss ce: {metrics.ce:.4f}, "
        f"Train Steps/Sec: {rate:.2f}, Tokens/Sec: {metrics.tokens_per_s / 1000:.2f}k, MFU: {metrics.mfu * 100:.1f}%, "
    )


@dataclass(frozen=True)
class WindowRates:
    """Rates since the last logged step."""

    step_time_s: float
    tokens_per_s: float
    tflops: float
    mfu: float
    work_tflops: float
    work_mfu: float


class RateWindow:
    """Sums tokens and operations between two log lines; counts the steps it really saw, so that the first window is right too.

    ``add`` takes global figures (all ranks), so every rank could keep one without talking to the others.
    """

    def __init__(self, peak_tflops_per_device: float, devices: int) -> None:
        self._peak, self._devices = peak_tflops_per_device, devices
        self._restart()

    def _restart(self) -> None:
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

    def exclude(self, seconds: float) -> None:
        """Leave time out that was not training (a checkpoint, sample images)."""
        self._since += seconds

    def close(self) -> WindowRates:
        """Rates of the window, and start the next one. Raises ValueError if no step was counted."""
        if not self._steps:
            raise ValueError("no step was counted since the last log line")
        seconds = max(time.perf_counter() - self._since, 1e-9)
        tflops, mfu = utilization(self._mfu_flops, seconds, self._peak, self._devices)
        work_tflops, work_mfu = utilization(self._work_flops, seconds, self._peak, self._devices)
        rates = WindowRates(seconds / self._steps, self._tokens / seconds, tflops, mfu, work_tflops, work_mfu)
        self._restart()
        return rates
