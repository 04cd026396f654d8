# SPDX-License-Identifier: Apache-2.0
"""The console line is the original's, and rates count the steps they saw."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_bagel.costs.flops import StepWork
from megatron_bagel.training.losses import LossTotals, StepLosses
from megatron_bagel.training.observability.metrics import RateWindow, StepMetrics, WindowRates, log_line
from megatron_bagel.training.optim.optimizer import StepOutcome
from megatron_bagel.training.step_result import Counters, StepDone, StepResult


def metrics(step: int = 10, loss: float = 0.95674, ce: float = 0.55041, mse: float = 0.40633, **observed: Any) -> StepMetrics:
    """A record like that of a small run."""
    totals, work = LossTotals(ce_tokens=29, mse_tokens=44), StepWork(tokens=300)
    result = StepResult(StepLosses(loss, ce, mse), StepOutcome(True, 1.25), totals, work, samples=8, lr=1e-4)
    counters = Counters(step + 1, samples=80, tokens=12345, skipped=2, bad_steps=1)
    rates = WindowRates(step_time_s=2.25, tokens_per_s=12341.0, tflops=3.5, mfu=0.1234, work_tflops=2.5, work_mfu=0.0625)
    return StepMetrics(StepDone(result, counters, seconds=2.0), rates, 2**31, **observed)


def test_line() -> None:
    expected = "(step=0000010) Train Loss mse: 0.4063, Train Loss ce: 0.5504, Train Steps/Sec: 0.44, Tokens/Sec: 12.34k, MFU: 12.3%, "
    assert log_line(metrics()) == expected


def test_a_record_has_every_number_under_its_name_in_one_order() -> None:
    record = metrics(by_dataset={"ce/vlm": 0.5}, observed={"pack_fill": 0.75}).as_json()
    assert list(record.items()) == [
        ("step", 10), ("loss", 0.95674), ("ce", 0.55041), ("mse", 0.40633), ("grad_norm", 1.25), ("lr", 1e-4), ("consumed_samples", 80),
        ("consumed_tokens", 12345), ("ce_tokens", 29), ("mse_tokens", 44), ("step_time_s", 2.25), ("tokens_per_s", 12341.0),
        ("tflops", 3.5), ("mfu", 0.1234), ("peak_mem_bytes", 2**31), ("step_tokens", 300), ("step_samples", 8), ("work_tflops", 2.5),
        ("work_mfu", 0.0625), ("skipped_samples", 2), ("bad_steps", 1), ("ce/vlm", 0.5), ("pack_fill", 0.75),
    ]  # fmt: skip


def test_json_is_exact_and_has_no_nan() -> None:
    record = json.loads(json.dumps(metrics(loss=1 / 3, ce=math.nan, mse=math.inf).as_json(), allow_nan=False))
    assert record["loss"] == 1 / 3 and record["ce"] is None and record["mse"] is None


def test_window_counts_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("megatron_bagel.training.observability.metrics.time.perf_counter", lambda: now[0])
    window = RateWindow(peak_tflops_per_device=1.0, devices=2)
    for _ in range(3):
        window.add(tokens=50, mfu_flops=1e12, work_flops=2e12)
    now[0] += 6.0
    with window.excluded():
        now[0] += 2.0
    rates = window.close()
    assert (rates.step_time_s, rates.tokens_per_s, rates.tflops, rates.mfu) == (2.0, 25.0, 0.5, 0.25)
    assert (rates.work_tflops, rates.work_mfu) == (1.0, 0.5)
    with pytest.raises(ValueError, match="no step"):
        window.close()
