"""What keeps a run alive, in one object for the loop: watchdog, bad steps, stop requests, stragglers, heartbeats to a launcher."""

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
from megatron_bagel.training.resilience.hang_watchdog import STORE, Limits, Watchdog, watching
from megatron_bagel.training.resilience.preemption import Grace
from megatron_bagel.training.resilience.stop_agreement import StepAgreement
from megatron_bagel.training.resilience.stragglers import Stragglers, StragglerSettings
from megatron_bagel.training.step_result import StepDone


@dataclass(frozen=True)
class ResilienceSettings:
    """What is done when something goes wrong.

    Attributes:
        results_dir: folder of the file of events.
        limits: how long ranks may take before they count as hanging.
        collective_minutes: how long a collective may take after the first step.
        first_collective_minutes: how long it may take before.
        bad_steps: what makes a step bad, and what follows.
        stragglers: how slow ranks are looked for.
        heartbeats: whether a launcher gets heartbeats; None when it started this process.
        grace_seconds: time between a scheduler's signal and its SIGKILL; None where unknown.
    """

    results_dir: Path
    limits: Limits
    collective_minutes: float
    first_collective_minutes: float
    bad_steps: BadStepSettings = field(default_factory=BadStepSettings)
    stragglers: StragglerSettings = field(default_factory=StragglerSettings)
    heartbeats: bool | None = None
    grace_seconds: float | None = None


@dataclass
class Survival:
    """Made before the run is set up, so that a hang there is seen too."""

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
        """Nobody watches and no signal is noted unless ``surviving`` gave them."""
        events = EventFile(settings.results_dir)
        idle = Watchdog(side_store(STORE), dist.get_rank(), dist.get_world_size(), settings.limits, settings.results_dir)
        return cls(
            settings.collective_minutes, events, watchdog or idle, StepAgreement(request), BadSteps(settings.bad_steps, events),
            Stragglers(settings.stragglers, events), LauncherHeartbeats(settings.heartbeats), Grace(settings.grace_seconds, events),
        )  # fmt: skip

    def hooks(self, last_save: Callable[[], float | None]) -> list[StepHook]:
        """What watches the steps; ``last_save`` gives the newest save's seconds, None before the first save."""
        return [
            SignsOfLife(self.watchdog, self.heartbeats),
            self.stragglers,
            GraceCheck(self.grace, last_save),
            CollectiveTimeout(self.collective_minutes),
        ]

    def note_stop(self, steps: int) -> None:
        """Say why the run ends before its last step, where it does."""
        if self.agreement.stop:
            self.events.write(steps, "stop", f"{self.agreement.reason}: saving after {steps} steps, then leaving; {self.grace.outlook()}")


@dataclass
class SignsOfLife(StepHook):
    """Tells the watchdog and a launcher that the run goes on. Pauses may take longer than a step."""

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
    """Cuts the time-out of collectives to ``minutes`` once the first step is over, which may take longer than any after it."""

    minutes: float
    _set: bool = False

    def after_step(self, done: StepDone) -> None:
        del done
        if not self._set:
            self._set = True
            set_collective_timeout(self.minutes)


@contextmanager
def surviving(settings: ResilienceSettings) -> Iterator[Survival]:
    """Signals are noted, and ranks watched, while the block runs."""
    with stop_on_signals() as request, watching(side_store(STORE), settings.limits, settings.results_dir) as watchdog:
        survival = Survival.of(settings, request, watchdog)
        survival.heartbeats.start()
        try:
            yield survival
        finally:
            # A monitor talks to one client at a time, and this process may begin again.
            survival.heartbeats.close()
        # No rank stops watching while another may still wait for it.
        dist.barrier()
