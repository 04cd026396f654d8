"""What keeps a run alive, in one object for the loop: watchdog, bad steps, stop requests, stragglers, heartbeats to a launcher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.config.parser import Config
from megatron_bagel.platform.launch.nvidia_resiliency import LauncherHeartbeats
from megatron_bagel.platform.launch.process_group import set_collective_timeout, side_store
from megatron_bagel.platform.launch.signals import StopRequest, stop_on_signals
from megatron_bagel.training.hooks import Pause, StepHook
from megatron_bagel.training.resilience.bad_steps import BadSteps
from megatron_bagel.training.resilience.events import EventFile
from megatron_bagel.training.resilience.hang_watchdog import STORE, Limits, Watchdog, watching
from megatron_bagel.training.resilience.preemption import Grace
from megatron_bagel.training.resilience.stop_agreement import StepAgreement
from megatron_bagel.training.resilience.stragglers import Stragglers
from megatron_bagel.training.step_result import StepDone


@dataclass
class Survival:
    """Made before the run is set up, so that a hang there is seen too."""

    config: Config
    events: EventFile
    watchdog: Watchdog
    agreement: StepAgreement
    bad_steps: BadSteps
    stragglers: Stragglers
    heartbeats: LauncherHeartbeats
    grace: Grace

    @classmethod
    def of(cls, config: Config, request: StopRequest | None = None, watchdog: Watchdog | None = None) -> Survival:
        """By the flags. Nobody watches and no signal is noted unless ``surviving`` gave them."""
        resilience = config.resilience
        events = EventFile(config.training.results_dir)
        results_dir = Path(config.training.results_dir)
        idle = Watchdog(side_store(STORE), dist.get_rank(), dist.get_world_size(), limits_of(config), results_dir)
        return cls(
            config, events, watchdog or idle, StepAgreement(request), BadSteps(resilience, events), Stragglers(resilience, events),
            LauncherHeartbeats(resilience.ft_heartbeats), Grace(resilience.preemption_grace_seconds, events),
        )  # fmt: skip

    def hooks(self, last_save: Callable[[], float | None]) -> list[StepHook]:
        """What watches the steps; ``last_save`` gives the newest save's seconds, None before the first save."""
        return [
            SignsOfLife(self.watchdog, self.heartbeats),
            self.stragglers,
            GraceCheck(self.grace, last_save),
            CollectiveTimeout(self.config.megatron.distributed_timeout_minutes),
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
def surviving(config: Config) -> Iterator[Survival]:
    """Signals are noted, and ranks watched, while the block runs."""
    with stop_on_signals() as request, watching(side_store(STORE), limits_of(config), config.training.results_dir) as watchdog:
        survival = Survival.of(config, request, watchdog)
        survival.heartbeats.start()
        try:
            yield survival
        finally:
            # A monitor talks to one client at a time, and this process may begin again.
            survival.heartbeats.close()
        # No rank stops watching while another may still wait for it.
        dist.barrier()


def limits_of(config: Config) -> Limits:
    """The watchdog's, in seconds: before the collectives give up."""
    resilience = config.resilience
    step = min(resilience.hang_timeout_minutes, 0.8 * config.megatron.distributed_timeout_minutes)
    return Limits(step * 60, resilience.first_step_timeout_minutes * 60)
