"""Learning rate per step, on Megatron's scheduler, counting so that the very first step already learns.

Megatron (and the original) start warm-up at step 0 with a rate of exactly 0: the first batch is read and thrown away. Here
step i (from 0) uses the rate of count i + 1, so warm-up rises lr/warmup, 2 lr/warmup, ...; ``zero_lr_first_step`` restores
the original's count. The rate logged for a step is the one that step used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

STYLES = ("constant", "cosine")


@dataclass(frozen=True)
class ScheduleSettings:
    """Linear warm-up to ``lr``, then constant, or cosine down to ``min_lr`` at ``total_steps``.

    Cosine: min_lr + (lr - min_lr) (1 + cos(pi p)) / 2 with p the fraction of the steps after warm-up; past ``total_steps``
    it stays at min_lr (the original's formula would rise again).
    """

    lr: float
    min_lr: float = 0.0
    warmup_steps: int = 0
    total_steps: int = 1
    style: str = "constant"
    zero_lr_first_step: bool = False

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"lr_scheduler is {self.style!r}; it must be one of {', '.join(STYLES)}.")
        if self.warmup_steps < 0 or self.total_steps < 1:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be >= 0 and total_steps ({self.total_steps}) >= 1.")
        if self.style == "cosine" and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be smaller than total_steps ({self.total_steps}) with "
                "--lr_scheduler cosine: there would be no step left to decay over."
            )
        if self.style == "cosine" and self.min_lr > self.lr:
            raise ValueError(f"min_lr ({self.min_lr}) must not be larger than lr ({self.lr}) with --lr_scheduler cosine.")


class LearningRate:
    """Sets the rate on the optimizer's groups. Call ``step()`` once after each optimizer step; ``lr`` is what the next one uses."""

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
            # A constant rate may warm up for longer than the run; Megatron only wants the decay to end after the warm-up.
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
        # A loaded optimizer brings its checkpoint's rates in the groups; the run's own flags must win.
        for group in self._optimizer.param_groups:
            group["max_lr"], group["min_lr"] = self.settings.lr, self._min_lr
        self._scheduler.num_steps = steps + self._first
        self._scheduler.step(0)

    @property
    def steps(self) -> int:
        """Optimizer steps done so far."""
        return self._scheduler.num_steps - self._first

    @property
    def lr(self) -> float:
        """Rate the next optimizer step will use."""
        return float(self._scheduler.get_lr({}))

    def step(self) -> None:
        """Move on by one optimizer step."""
        self._scheduler.step(1)

    def state_dict(self) -> dict[str, int]:
        """Only the count is state: rates, warm-up and style come from the flags of the run that continues."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue at a count. Call after the optimizer's own state has been loaded."""
        self._set(int(state["steps"]))
