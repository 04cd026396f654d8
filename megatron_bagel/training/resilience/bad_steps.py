# SPDX-License-Identifier: Apache-2.0
"""Detects steps that must not reach the weights: numbers that are not finite, and loss spikes. It judges a step before the update.

The verdict follows from sums over the world (``step.py``), so it is the same on every rank. With ``rerun`` Megatron-Core's
``RerunStateMachine`` computes the step again from the same weights, data and random states. A rank whose local numbers differ has then
computed wrongly once.
"""

from __future__ import annotations

import math
import socket
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

from megatron_bagel import platform
from megatron_bagel.parallel.rank_coordinates import rank_list
from megatron_bagel.training.losses import StepLosses
from megatron_bagel.training.resilience.events import EventFile

HISTORY = 50  # good steps whose median loss a spike is compared with
_MIN_HISTORY = 10  # good steps before which no loss counts as a spike


@dataclass
class Attempt:
    """One computation of a step's gradients. ``local_numbers`` of this rank, not summed over ranks, must be equal in a second attempt."""

    losses: StepLosses
    grad_norm: float
    local_numbers: torch.Tensor


@dataclass(frozen=True)
class BadStepSettings:
    """Settings that define a bad step and its consequence.

    Attributes:
        on_bad_step: "stop", "skip" or "rerun".
        loss_spike_factor: A loss above this many times the recent median is bad; 0 for no limit.
        max_bad_steps: The number of bad steps in a row that ends the run.
    """

    on_bad_step: str = "stop"
    loss_spike_factor: float = 0.0
    max_bad_steps: int = 10


class BadSteps:
    """Judges the steps of a run. It keeps recent losses, the number of bad steps in a row, and their ``count`` since the run began."""

    def __init__(self, settings: BadStepSettings, events: EventFile, count: int = 0) -> None:
        self.settings, self.events, self.count = settings, events, count
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._in_a_row = 0
        self._machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS) if settings.on_bad_step == "rerun" else None

    def attempt(self, step: int, compute: Callable[[], Attempt]) -> tuple[Attempt, bool]:
        """Compute a step once, or twice with ``rerun``, and judge it. Collective.

        Args:
            step: The number of the step.
            compute: Computes the gradients of the step.

        Returns:
            The numbers of the step, and whether its update may be made.

        Raises:
            FloatingPointError: The run must stop. No weight has changed.
        """
        if self._machine is None:
            attempt = compute()
            problem = self.problem(attempt)
        else:
            attempt, problem = self._compute_twice(step, compute)
        if not problem:
            self._in_a_row = 0
            self._losses.append(attempt.losses.loss)
            return attempt, True
        self.count += 1
        self._in_a_row += 1
        numbers = {"loss": attempt.losses.loss, "grad_norm": attempt.grad_norm}
        stop = self.settings.on_bad_step != "skip" or self._in_a_row >= self.settings.max_bad_steps
        self.events.write(step, "bad_step", f"{problem}; {'the run stops' if stop else 'no update is made'}", numbers)
        if stop:
            raise FloatingPointError(f"step {step}: {problem}. {self._advice()}")
        return attempt, False

    @property
    def compares(self) -> bool:
        """Return whether attempts are compared, so that they need ``local_numbers``."""
        return self._machine is not None

    def problem(self, attempt: Attempt) -> str:
        """Describe what makes a step bad, in the same words on all ranks; empty for a good step."""
        losses = attempt.losses
        if losses.faults or not math.isfinite(losses.loss):
            name = "the loss" if not math.isfinite(losses.loss) else "the gradient"
            return f"{name} is not finite (loss {losses.loss}, gradient norm {attempt.grad_norm})"
        factor = self.settings.loss_spike_factor
        if factor and len(self._losses) >= _MIN_HISTORY and losses.loss > factor * (recent_loss := median(self._losses)):
            return f"loss spike: {losses.loss:.4g} is more than {factor:g} times the recent {recent_loss:.4g}"
        return ""

    def _advice(self) -> str:
        """Return what to do about the bad step that ends the run."""
        if self.settings.on_bad_step == "skip":
            return (
                f"This is bad step number {self._in_a_row} in a row (--max_bad_steps). Resume from an earlier checkpoint, with a lower --lr"
            )
        rerun = "The second computation was bad too, so data or settings are at fault rather than a device. " if self._machine else ""
        return (
            f"{rerun}No weight was touched. Resume from the last checkpoint with a lower --lr or --max_grad_norm, or with "
            "--on_bad_step skip; the packs of this step will come again"
        )

    def _compute_twice(self, step: int, compute: Callable[[], Attempt]) -> tuple[Attempt, str]:
        """Compute a step, and again if it is bad. Return the last attempt and its problem."""
        machine: Any = self._machine
        first_problem, difference = "", 0.0
        # The machine validates nothing in its first iteration, when there is no checkpoint to restart from. A restart is not needed here.
        machine.first_iteration_complete = True

        def compare(first: torch.Tensor, second: torch.Tensor) -> float:
            nonlocal difference
            is_equal = torch.equal(first.nan_to_num(), second.nan_to_num()) and torch.equal(first.isfinite(), second.isfinite())
            difference = 0.0 if is_equal else math.inf
            return difference

        while machine.should_run_forward_backward(None):
            attempt = compute()
            problem = self.problem(attempt)
            first_problem = first_problem or problem
            machine.validate_result(
                attempt.local_numbers, lambda _, is_bad=bool(problem): is_bad, message="bad step", comparison_func=compare, fatal=False
            )
        machine.should_checkpoint_and_exit()
        if first_problem:
            self._report_rerun(step, first_problem, problem, difference > 0)
        return attempt, problem

    def _report_rerun(self, step: int, first_problem: str, second_problem: str, differs: bool) -> None:
        """Report the ranks whose numbers changed between the attempts. Collective over the world."""
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, (differs, socket.gethostname(), str(platform.device())))
        ranks = [rank for rank, (is_different, _, _) in enumerate(states) if is_different]
        devices = ", ".join(f"{states[rank][1]} {states[rank][2]}" for rank in ranks[:8])
        text = (
            f"{rank_list(ranks)} ({devices}) computed different numbers the second time" if ranks else "every rank computed the same again"
        )
        verdict = "still bad" if second_problem else "good now"
        self.events.write(step, "rerun", f"{first_problem}; {text}; {verdict}", {"ranks": ranks})

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, so that a resumed run judges its steps like an uninterrupted one."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""
        self._losses = deque(state["losses"], maxlen=HISTORY)
        self._in_a_row, self.count = state["in_a_row"], state["count"]
