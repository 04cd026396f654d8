"""What a run does when something goes wrong: bad numbers, ranks that hang, slow ranks, NVIDIA's resiliency package. All ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bagel.config.arguments import flag


@dataclass
class ResilienceArguments:
    """Bad steps, hangs and stragglers."""

    on_bad_step: Literal["stop", "skip", "rerun"] = flag(
        "stop",
        "Before an update that is not finite or a loss spike: stop ends the run, skip leaves the update out and goes on with the next "
        "data, rerun computes the step once more: if the numbers differ it goes on and names the rank, else it stops.",
    )
    loss_spike_factor: float = flag(
        0.0, "A loss above this many times the median of the last 50 good steps makes a bad step; 0: only NaN does."
    )
    max_bad_steps: int = flag(10, "With on_bad_step skip or rerun: so many bad steps in a row end the run.")
    hang_timeout_minutes: float = flag(
        8.0, "No step for so long: the ranks that do not answer are named and the run ends; 0 never. Below distributed_timeout_minutes."
    )
    first_step_timeout_minutes: float = flag(
        60.0, "The same for set-up and the first step (collectives too), and for saves and evaluations, which all take longer than a step."
    )
    straggler_every: int = flag(500, "Steps between measurements of each rank's own time; slow ranks are named in the log. 0 never.")
    straggler_factor: float = flag(1.3, "A rank is slow when its own time is this many times the median of all ranks.")
    ft_heartbeats: bool | None = flag(
        None, "Send heartbeats to ft_launcher (package nvidia-resiliency-ext). Default: when it started this process."
    )
    local_checkpoint_dir: str | None = flag(
        None,
        "Folder on a disk of each node for checkpoints between checkpoints, each rank's own share; a restart on the same layout uses them. "
        "Needs nvidia-resiliency-ext and --save_local_every.",
    )
    save_local_every: int = flag(0, "Steps between local checkpoints; only the newest is kept. Not in steps that are saved anyway.")
    preemption_grace_seconds: float | None = flag(
        None,
        "Time between a scheduler's SIGTERM or SIGUSR1 and its SIGKILL: warn, before any signal, when two steps and a save take longer.",
    )
    inprocess_restarts: int = flag(
        0,
        "So often an error that leaves all ranks alive starts the run again from its newest checkpoint in the same processes. Needs "
        "nvidia-resiliency-ext, torchrun and --auto_resume True. Lost ranks are the launcher's; on CPU, errors of single ranks too.",
    )
