"""What keeps a run alive, in one object for the loop: watchdog, bad steps, stop requests, stragglers, heartbeats to a launcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.config.parser import Config
from megatron_bagel.platform.launch.nvidia_resiliency import LauncherHeartbeats
from megatron_bagel.platform.launch.process_group import set_collective_timeout, side_store
from megatron_bagel.platform.launch.signals import StopRequest, stop_on_signals
from megatron_bagel.training.resilience.bad_steps import BadSteps
from megatron_bagel.training.resilience.events import EventFile
from megatron_bagel.training.resilience.hang_watchdog import STORE, Limits, Watchdog, watching
from megatron_bagel.training.resilience.preemption import Grace
from megatron_bagel.training.resilience.stop_agreement import StepAgreement
from megatron_bagel.training.resilience.stragglers import Stragglers


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
    _first: bool = True

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
            set_collective_timeout(self.config.megatron.distributed_timeout_minutes)

    def note_stop(self, steps: int) -> None:
        """Say why the run ends before its last step, where it does."""
        if self.agreement.stop:
            self.events.write(steps, "stop", f"{self.agreement.reason}: saving after {steps} steps, then leaving; {self.grace.outlook()}")


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
