"""Steps that must not reach the weights: numbers that are not finite, and loss spikes. Judged before the update, alike on all ranks.

The verdict follows from sums over the world (step.py), so that every rank comes to the same one. With ``rerun`` Megatron-Core's
RerunStateMachine computes the step again from the same weights, data and random states; a rank whose own numbers differ then has computed
wrongly once.
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

HISTORY = 50  # good steps that a spike is measured against
_ENOUGH = 10  # before so many good steps there are no spikes


@dataclass
class Attempt:
    """One computation of a step's gradients. ``own`` is this rank's number before any sum over ranks: what a second attempt must repeat."""

    losses: StepLosses
    grad_norm: float
    own: torch.Tensor


@dataclass(frozen=True)
class BadStepSettings:
    """What makes a step bad, and what follows.

    Attributes:
        on_bad_step: "stop", "skip" or "rerun".
        loss_spike_factor: a loss above this many times the recent median is bad; 0 for none.
        max_bad_steps: so many in a row end the run.
    """

    on_bad_step: str = "stop"
    loss_spike_factor: float = 0.0
    max_bad_steps: int = 10


class BadSteps:
    """The policy of a run, and its memory: recent losses (for spikes), bad steps in a row, and ``count`` of them since the run began."""

    def __init__(self, settings: BadStepSettings, events: EventFile, count: int = 0) -> None:
        self.settings, self.events, self.count = settings, events, count
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._in_a_row = 0
        self._machine = RerunStateMachine(mode=RerunMode.VALIDATE_RESULTS) if settings.on_bad_step == "rerun" else None

    def attempt(self, step: int, compute: Callable[[], Attempt]) -> tuple[Attempt, bool]:
        """The step's numbers, and whether its update may be made. ``compute`` is called once, or twice with ``rerun``. Collective.

        Raises FloatingPointError when the run must stop; no weight has been touched then.
        """
        if self._machine is None:
            found = compute()
            wrong = self.wrong(found)
        else:
            found, wrong = self._twice(step, compute)
        if not wrong:
            self._in_a_row = 0
            self._losses.append(found.losses.loss)
            return found, True
        self.count += 1
        self._in_a_row += 1
        numbers = {"loss": found.losses.loss, "grad_norm": found.grad_norm}
        stop = self.settings.on_bad_step != "skip" or self._in_a_row >= self.settings.max_bad_steps
        self.events.write(step, "bad_step", f"{wrong}; {'the run stops' if stop else 'no update is made'}", numbers)
        if stop:
            raise FloatingPointError(f"step {step}: {wrong}. {self._advice()}")
        return found, False

    @property
    def compares(self) -> bool:
        """Whether attempts are compared, so that ``own`` is needed."""
        return self._machine is not None

    def wrong(self, found: Attempt) -> str:
        """What is wrong with a step's numbers; empty when nothing is. The same on all ranks."""
        losses = found.losses
        if losses.faults or not math.isfinite(losses.loss):
            where = "the loss" if not math.isfinite(losses.loss) else "the gradient"
            return f"{where} is not finite (loss {losses.loss}, gradient norm {found.grad_norm})"
        factor = self.settings.loss_spike_factor
        if factor and len(self._losses) >= _ENOUGH and losses.loss > factor * (usual := median(self._losses)):
            return f"loss spike: {losses.loss:.4g} is more than {factor:g} times the recent {usual:.4g}"
        return ""

    def _advice(self) -> str:
        if self.settings.on_bad_step == "skip":
            return f"That is bad step number {self._in_a_row} in a row (--max_bad_steps); resume from an earlier checkpoint, lower --lr"
        again = "Computed twice, both times bad, so data or settings are at fault rather than a device. " if self._machine else ""
        return (
            f"{again}No weight was touched. Resume from the last checkpoint with a lower --lr or --max_grad_norm, or with "
            "--on_bad_step skip; the packs of this step come again then"
        )

    def _twice(self, step: int, compute: Callable[[], Attempt]) -> tuple[Attempt, str]:
        machine: Any = self._machine
        first_wrong, differs = "", 0.0
        # In its first iteration the machine validates nothing, as it could not ask for a restart from a checkpoint. None is asked here.
        machine.first_iteration_complete = True

        def compare(before: torch.Tensor, now: torch.Tensor) -> float:
            nonlocal differs
            same = torch.equal(before.nan_to_num(), now.nan_to_num()) and torch.equal(before.isfinite(), now.isfinite())
            differs = 0.0 if same else math.inf
            return differs

        while machine.should_run_forward_backward(None):
            found = compute()
            wrong = self.wrong(found)
            first_wrong = first_wrong or wrong
            machine.validate_result(found.own, lambda _, wrong=wrong: bool(wrong), message="bad step", comparison_func=compare, fatal=False)
        machine.should_checkpoint_and_exit()
        if first_wrong:
            self._attribute(step, first_wrong, wrong, differs > 0)
        return found, wrong

    def _attribute(self, step: int, first: str, second: str, differs: bool) -> None:
        """Say whose numbers changed between the attempts. Collective over the world."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (differs, socket.gethostname(), str(platform.device())))
        odd = [rank for rank, (differed, _, _) in enumerate(everyone) if differed]
        places = ", ".join(f"{everyone[rank][1]} {everyone[rank][2]}" for rank in odd[:8])
        who = f"{rank_list(odd)} ({places}) computed something else the second time" if odd else "every rank computed the same again"
        self.events.write(step, "rerun", f"{first}; {who}; {'still bad' if second else 'good now'}", {"ranks": odd})

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: a resumed run judges as the uninterrupted one."""
        return {"losses": list(self._losses), "in_a_row": self._in_a_row, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``."""
        self._losses = deque(state["losses"], maxlen=HISTORY)
        self._in_a_row, self.count = state["in_a_row"], state["count"]
