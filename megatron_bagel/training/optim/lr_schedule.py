# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each step, by Megatron's scheduler, but with a first step that already learns.

Megatron (and the original) start warm-up at step 0 with a rate of exactly 0, so the first batch has no effect. Here step i
(from 0) uses the rate of count i + 1, so warm-up rises lr/warmup, 2 lr/warmup, ...; ``zero_lr_first_step`` restores the
original's count. The log shows the rate that a step used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

STYLES = ("constant", "cosine")


@dataclass(frozen=True)
class ScheduleSettings:
    """Settings of a schedule: linear warm-up to ``lr``, then constant, or cosine down to ``min_lr`` at ``total_steps``.

    The cosine is min_lr + (lr - min_lr) (1 + cos(pi p)) / 2, where p is the fraction of the steps after warm-up. Past
    ``total_steps`` the rate stays at min_lr (the original's formula would rise again).
    """

    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 1
    style: str = "constant"
    zero_lr_first_step: bool = False

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"--lr_scheduler is {self.style!r}; it must be one of {', '.join(STYLES)}")
        if self.warmup_steps < 0 or self.total_steps < 1:
            raise ValueError(f"--warmup_steps is {self.warmup_steps} and --total_steps {self.total_steps}; they must be at least 0 and 1")
        if self.style == "cosine" and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"--warmup_steps ({self.warmup_steps}) must be smaller than --total_steps ({self.total_steps}) with "
                "--lr_scheduler cosine: no step would be left for the decay"
            )
        if self.style == "cosine" and self.min_lr > self.lr:
            raise ValueError(f"--min_lr ({self.min_lr}) must not be larger than --lr ({self.lr}) with --lr_scheduler cosine")


class LearningRate:
    """Sets the rate of the optimizer's groups. Call ``step()`` once after each optimizer step; ``lr`` is the rate of the next one."""

    def __init__(self, optimizer: MegatronOptimizer, settings: ScheduleSettings) -> None:
        self.settings = settings
        self._first = 0 if settings.zero_lr_first_step else 1
        constant = settings.style == "constant"
        min_lr = min(settings.min_lr, settings.lr)
        self._scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=min_lr,
            lr_warmup_steps=settings.warmup_steps,
            # A constant rate may warm up for longer than the run, and Megatron requires the decay to end after the warm-up.
            lr_decay_steps=max(settings.total_steps, settings.warmup_steps + 1) if constant else settings.total_steps,
            lr_decay_style=settings.style,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        self._optimizer = optimizer
        self._min_lr = min_lr
        self._set(0)

    def _set(self, steps: int) -> None:
        # The groups of a loaded optimizer have the rates of its checkpoint, but the flags of this run decide.
        for group in self._optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self.settings.lr, self._min_lr
        self._scheduler.num_steps = steps + self._first
        self._scheduler.step(0)

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps done so far."""
        return self._scheduler.num_steps - self._first

    @property
    def lr(self) -> float:
        """Return the rate of the next optimizer step."""
        return float(self._scheduler.get_lr({}))

    def step(self) -> None:
        """Advance by one optimizer step."""
        self._scheduler.step(1)

    def state_dict(self) -> dict[str, int]:
        """Return the count of steps, which is the only state. Rates, warm-up and style come from the flags of the run that continues."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at the count in ``state``. Call it after the optimizer's own state has been loaded."""
        self._set(int(state["steps"]))
