# SPDX-License-Identifier: Apache-2.0
"""How much of the time of a long run trains, when ranks fail and checkpoints stop it: goodput, and the interval of saves that is best.

Failures are taken as independent with a constant rate, so a job of n GPUs fails every M = 1 / (n * rate) seconds on average. With saves
of d seconds after every t seconds of training and r seconds for a restart, Daly's exact model ("A higher order estimate of the optimum
checkpoint interval for restart dumps", 2006) has an expected wall time of M exp(r / M) (exp((t + d) / M) - 1) for t seconds of progress.
The ratio of the two is the effective training time ratio (ETTR). It is highest where (1 - t / M) exp((t + d) / M) = 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from megatron_bagel.config.plan_arguments import PlanArguments

SECONDS_PER_DAY = 86400.0


@dataclass(frozen=True)
class Reliability:
    """Assumptions about failures and saves.

    Attributes:
        failures_per_gpu_day: The failures of one GPU per day that end the run.
        restart_seconds: The time from a failure to the first new step.
        save_seconds: The time for which a save stops the training.
        straggler_share: The share of a step that ranks wait for the slowest one.
    """

    failures_per_gpu_day: float
    restart_seconds: float
    save_seconds: float
    straggler_share: float = 0.0

    @classmethod
    def of(cls, arguments: PlanArguments) -> Reliability:
        """Return the assumptions that the flags give."""
        return cls(arguments.failures_per_gpu_day, arguments.restart_minutes * 60, arguments.save_seconds, arguments.straggler_share)


@dataclass(frozen=True)
class Goodput:
    """The effect of failures on a run.

    Attributes:
        hours_between_failures: The mean time between failures of the job; infinite without failures.
        step_time_s: The step with stragglers.
        save_every: The steps between saves of the run.
        ettr: The share of the time that trains with these saves.
        best_save_every: The steps between saves with the highest share.
        best_ettr: That share.
    """

    hours_between_failures: float
    step_time_s: float
    save_every: int
    ettr: float
    best_save_every: int
    best_ettr: float

    def to_dict(self) -> dict[str, float | None]:
        """Return the fields for JSON, which has no infinity."""
        return {name: None if math.isinf(value) else value for name, value in asdict(self).items()}


def ettr(interval: float, mean_failure: float, reliability: Reliability) -> float:
    """Return the share of time that trains.

    Args:
        interval: The seconds of training between saves.
        mean_failure: The mean seconds between failures of the job; may be infinite.
        reliability: The durations of saves and restarts.
    """
    saved = interval + reliability.save_seconds
    if math.isinf(mean_failure):
        return interval / saved
    exponent = reliability.restart_seconds / mean_failure + saved / mean_failure
    if exponent > 500:
        return 0.0  # the job practically never reaches its next save
    return interval / (mean_failure * math.exp(reliability.restart_seconds / mean_failure) * math.expm1(saved / mean_failure))


def best_interval(mean_failure: float, reliability: Reliability) -> float:
    """Return the seconds of training between saves with the highest ``ettr``. It is infinite without failures."""
    if math.isinf(mean_failure):
        return math.inf
    low, high = 0.0, mean_failure
    for _ in range(200):
        middle = (low + high) / 2
        # Falls from above 1 to 0 as the interval grows from 0 to the mean time between failures.
        value = math.log1p(-middle / mean_failure) + (middle + reliability.save_seconds) / mean_failure
        low, high = (middle, high) if value > 0 else (low, middle)
    return low


def goodput(step_time_s: float, gpus: int, save_every: int, reliability: Reliability) -> Goodput:
    """Return the effect of failures on a run of ``gpus`` GPUs that saves every ``save_every`` steps."""
    step = step_time_s * (1 + reliability.straggler_share)
    rate = gpus * reliability.failures_per_gpu_day / SECONDS_PER_DAY
    mean_failure = 1 / rate if rate else math.inf
    best_seconds = best_interval(mean_failure, reliability)
    best = save_every if math.isinf(best_seconds) else max(1, round(best_seconds / step))
    shares = [ettr(steps * step, mean_failure, reliability) for steps in (save_every, best)]
    return Goodput(mean_failure / 3600, step, save_every, shares[0], best, shares[1])
