"""What keeps a run alive, in one object for the loop: watchdog, bad steps, stop requests, stragglers, heartbeats to a launcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.platform.launch.nvidia_resiliency import LauncherHeartbeats
from megatron_bagel.platform.launch.process_group import set_collective_timeout, side_store
from megatron_bagel.platform.launch.signals import StopRequest, stop_on_signals
from megatron_bagel.training.resilience.bad_steps import BadSteps, BadStepSettings
from megatron_bagel.training.resilience.events import EventFile
from megatron_bagel.training.resilience.hang_watchdog import STORE, Limits, Watchdog, watching
from megatron_bagel.training.resilience.preemption import Grace
from megatron_bagel.training.resilience.stop_agreement import StepAgreement
from megatron_bagel.training.resilience.stragglers import Stragglers, StragglerSettings


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
    _first: bool = True

    @classmethod
    def of(cls, settings: ResilienceSettings, request: StopRequest | None = None, watchdog: Watchdog | None = None) -> Survival:
        """Nobody watches and no signal is noted unless ``surviving`` gave them."""
        events = EventFile(settings.results_dir)
        idle = Watchdog(side_store(STORE), dist.get_rank(), dist.get_world_size(), settings.limits, settings.results_dir)
        return cls(
            settings.collective_minutes, events, watchdog or idle, StepAgreement(request), BadSteps(settings.bad_steps, events),
            Stragglers(settings.stragglers, events), LauncherHeartbeats(settings.heartbeats), Grace(settings.grace_seconds, events),
        )  # fmt: skip

    def step_done(self, steps: int, seconds: float, last_save: float | None) -> None:
        """After every step, ``steps`` of them done, the last in ``seconds``; ``last_save`` is the newest save's time, where there was one.

        Collective in the steps that measure stragglers.
        """
        self.watchdog.progress(steps)
        self.heartbeats.beat()
        self.stragglers.step_ended(steps - 1)
        self.grace.step_took(steps, seconds, last_save)
        if self._first:
            self._first = False
            set_collective_timeout(self.collective_minutes)

    def note_stop(self, steps: int) -> None:
        """Say why the run ends before its last step, where it does."""
        if self.agreement.stop:
            self.events.write(steps, "stop", f"{self.agreement.reason}: saving after {steps} steps, then leaving; {self.grace.outlook()}")


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
