# SPDX-License-Identifier: Apache-2.0
"""Flags of what a run does when something goes wrong, NVIDIA's resiliency package included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_bagel.config.flag import FREE, SAID, flag


@dataclass
class ResilienceArguments:
    """Flags of bad steps, hangs, stragglers, local checkpoints and restarts."""

    on_bad_step: Literal["stop", "skip", "rerun"] = flag(
        "stop",
        "What to do before an update that is not finite or follows a loss spike. stop ends the run. skip drops the update and continues "
        "with the next data. rerun repeats the step: if the numbers differ, it names the rank and continues, else it stops.",
        on_resume=SAID,
    )
    loss_spike_factor: float = flag(
        0.0,
        "A step is bad when its loss exceeds the median of the last 50 good steps by this factor. 0 only reacts to NaN.",
        minimum=0,
        on_resume=SAID,
    )
    max_bad_steps: int = flag(10, "Bad steps in a row that end the run, with on_bad_step skip or rerun.", minimum=1, on_resume=FREE)
    hang_timeout_minutes: float = flag(
        8.0,
        "End the run when no step finishes for this long, and name the ranks that do not answer. 0 turns this off. Must be below "
        "distributed_timeout_minutes.",
        minimum=0,
        on_resume=FREE,
    )
    first_step_timeout_minutes: float = flag(
        60.0,
        "The same limit for phases that take longer than a step: set-up, the first step and its collectives, saves and evaluations.",
        on_resume=FREE,
    )
    straggler_every: int = flag(
        500, "Steps between measurements of each rank's own time. The log names slow ranks. 0 never measures.", minimum=0, on_resume=FREE
    )
    straggler_factor: float = flag(
        1.3, "A rank is slow when its own time is this many times the median of all ranks.", minimum=1, on_resume=FREE
    )
    ft_heartbeats: bool | None = flag(
        None,
        "Send heartbeats to ft_launcher (package nvidia-resiliency-ext). Default: True when ft_launcher started this process.",
        on_resume=FREE,
    )
    local_checkpoint_dir: str | None = flag(
        None,
        "Folder on a local disk of each node for checkpoints between the regular ones. Each rank saves its own share; a restart with the "
        "same parallel sizes reads it. Needs nvidia-resiliency-ext and --save_local_every.",
        on_resume=FREE,
    )
    save_local_every: int = flag(
        0,
        "Steps between local checkpoints. Only the newest is kept. Steps with a regular checkpoint write none.",
        minimum=0,
        on_resume=FREE,
    )
    preemption_grace_seconds: float | None = flag(
        None,
        "Time between a scheduler's SIGTERM or SIGUSR1 and its SIGKILL. The run warns early when two steps and a save take longer.",
        above=0,
        on_resume=FREE,
    )
    inprocess_restarts: int = flag(
        0,
        "How often the run may restart in the same processes from its newest checkpoint, after an error that leaves all ranks alive. "
        "Needs nvidia-resiliency-ext, torchrun and --auto_resume True. The launcher handles lost ranks and, on CPU, a single rank's error.",
        minimum=0,
        on_resume=FREE,
    )
