# SPDX-License-Identifier: Apache-2.0
"""Collects what monitors a run in one object for the loop: watchdog, bad steps, stop requests, stragglers, launcher heartbeats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.platform.launch.nvidia_resiliency import LauncherHeartbeats
from megatron_bagel.platform.launch.process_group import set_collective_timeout, side_store
from megatron_bagel.platform.launch.signals import StopRequest, stop_on_signals
from megatron_bagel.training.hooks import Pause, StepHook
from megatron_bagel.training.resilience.bad_steps import BadSteps, BadStepSettings
from megatron_bagel.training.resilience.events import EventFile
from megatron_bagel.training.resilience.hang_watchdog import COMMAND, STORE, Limits, Watchdog, watching
from megatron_bagel.training.resilience.preemption import Grace
from megatron_bagel.training.resilience.stop_agreement import StepAgreement
from megatron_bagel.training.resilience.stragglers import Stragglers, StragglerSettings
from megatron_bagel.training.step_result import StepDone


@dataclass(frozen=True)
class ResilienceSettings:
    """Settings of the monitors of a run.

    Attributes:
        results_dir: The folder of ``events.jsonl``.
        limits: How long a rank may take before it counts as hanging.
        collective_minutes: The time-out of collectives after the first step.
        first_collective_minutes: The time-out of collectives until then.
        bad_steps: What defines a bad step, and its consequence.
        stragglers: How slow ranks are detected.
        heartbeats: Whether a launcher gets heartbeats; None for yes if it started this process.
        grace_seconds: The time between a scheduler's signal and its SIGKILL; None if unknown.
        command: Name of the command in its messages.
    """

    results_dir: Path
    limits: Limits
    collective_minutes: float
    first_collective_minutes: float
    bad_steps: BadStepSettings = field(default_factory=BadStepSettings)
    stragglers: StragglerSettings = field(default_factory=StragglerSettings)
    heartbeats: bool | None = None
    grace_seconds: float | None = None
    command: str = COMMAND


@dataclass
class Survival:
    """Holds the monitors of a run. They exist before the run is set up, so that they detect a hang in set-up too."""

    collective_minutes: float
    events: EventFile
    watchdog: Watchdog
    agreement: StepAgreement
    bad_steps: BadSteps
    stragglers: Stragglers
    heartbeats: LauncherHeartbeats
    grace: Grace

    @classmethod
    def of(cls, settings: ResilienceSettings, request: StopRequest | None = None, watchdog: Watchdog | None = None) -> Survival:
        """Build the monitors. Without the ``request`` and ``watchdog`` of ``surviving`` no signal is noted and no thread watches."""
        events = EventFile(settings.results_dir)
        idle = Watchdog(side_store(STORE), dist.get_rank(), dist.get_world_size(), settings.limits, settings.results_dir)
        return cls(
            settings.collective_minutes, events, watchdog or idle, StepAgreement(request), BadSteps(settings.bad_steps, events),
            Stragglers(settings.stragglers, events), LauncherHeartbeats(settings.heartbeats), Grace(settings.grace_seconds, events),
        )  # fmt: skip

    def hooks(self, last_save: Callable[[], float | None]) -> list[StepHook]:
        """Return the hooks of the monitors. ``last_save`` returns the seconds of the newest save, or None before the first."""
        return [
            SignsOfLife(self.watchdog, self.heartbeats),
            self.stragglers,
            GraceCheck(self.grace, last_save),
            CollectiveTimeout(self.collective_minutes),
        ]

    def note_stop(self, steps: int) -> None:
        """Write an event with the reason if the run ends before its last step."""
        if self.agreement.stop:
            self.events.write(steps, "stop", f"{self.agreement.reason}: saving after {steps} steps, then ending; {self.grace.outlook()}")


@dataclass
class SignsOfLife(StepHook):
    """Reports progress to the watchdog and the launcher. A pause may take longer than a step."""

    watchdog: Watchdog
    heartbeats: LauncherHeartbeats

    def after_step(self, done: StepDone) -> None:
        self.watchdog.progress(done.counters.steps)
        self.heartbeats.beat()

    def pause(self, pause: Pause) -> AbstractContextManager[None]:
        return self.watchdog.slow(pause.value)


@dataclass
class GraceCheck(StepHook):
    """Compares the time that steps and saves take with the time between a scheduler's signal and its SIGKILL."""

    grace: Grace
    last_save: Callable[[], float | None]

    def after_step(self, done: StepDone) -> None:
        self.grace.step_took(done.counters.steps, done.seconds, self.last_save())


@dataclass
class CollectiveTimeout(StepHook):
    """Sets the time-out of collectives to ``minutes`` after the first step, which may take longer than any other."""

    minutes: float
    _set: bool = False

    def after_step(self, done: StepDone) -> None:
        del done
        if not self._set:
            self._set = True
            set_collective_timeout(self.minutes)


@contextmanager
def surviving(settings: ResilienceSettings) -> Iterator[Survival]:
    """Note signals and watch the ranks within the block."""
    with stop_on_signals() as request, watching(side_store(STORE), settings.limits, settings.results_dir, settings.command) as watchdog:
        survival = Survival.of(settings, request, watchdog)
        survival.heartbeats.start()
        try:
            yield survival
        finally:
            # A launcher's monitor serves one client at a time, and this process may start another run.
            survival.heartbeats.close()
        # No rank stops watching while another may still wait for it.
        dist.barrier()
