# SPDX-License-Identifier: Apache-2.0
"""A record such as a training step leaves, for benchmarks of what is done with it."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_bagel.costs.flops import StepWork
from megatron_bagel.training.losses import LossTotals, StepLosses
from megatron_bagel.training.observability.metrics import StepMetrics, WindowRates
from megatron_bagel.training.optim.optimizer import StepOutcome
from megatron_bagel.training.step_result import Counters, StepDone, StepResult


def step_done(work: StepWork, step: int = 0) -> StepDone:
    """A step of that work, with numbers of usual lengths."""
    result = StepResult(StepLosses(0.5, 0.5, 0.5), StepOutcome(True, 0.5), LossTotals(1000, 0.5, 1000), work, samples=1000, lr=0.5)
    return StepDone(result, Counters(step + 1, samples=1000, tokens=1000), seconds=0.5)


def step_record(work: StepWork, step: int = 0, observed: Mapping[str, float] | None = None) -> StepMetrics:
    """The same as it is logged."""
    return StepMetrics(step_done(work, step), WindowRates(*[0.5] * 6), 1000, observed=observed or {})
