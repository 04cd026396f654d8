# SPDX-License-Identifier: Apache-2.0
"""The training loop: data, step, log, evaluate, save. Everything else that watches a run is a hook (``hooks.py``)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.checkpoint.dist.stored_run import RUN_ID
from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.data.loading.loader import PackLoader, StepBatch
from megatron_bagel.data.planner.stream import NoSampleLeft
from megatron_bagel.training.evaluation.evaluator import Evaluation
from megatron_bagel.training.hooks import Hooks, Pause
from megatron_bagel.training.observability.logging_sinks import RunLog
from megatron_bagel.training.observability.loss_table import LossTable
from megatron_bagel.training.observability.step_log import StepLog
from megatron_bagel.training.observability.timers import Timers
from megatron_bagel.training.optim.optimizer import synced_parameters
from megatron_bagel.training.resilience.resume_fingerprint import FINGERPRINT
from megatron_bagel.training.resilience.run_monitors import Survival
from megatron_bagel.training.resilience.unreadable_samples import Replacements
from megatron_bagel.training.saving import Saving
from megatron_bagel.training.step import StepSettings, StepWatch, Trainable, train_step
from megatron_bagel.training.step_result import Counters, StepDone, StepResult

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints


@dataclass(frozen=True)
class LoopSettings:
    """Settings of the loop itself: the ``total_steps`` of the run, the number of steps between evaluations, whether its starting weights
    are evaluated too, and whether the latents of a step are computed beside the step before."""

    total_steps: int
    eval_every: int = 0
    eval_at_start: bool = False
    overlap_vae_encode: bool = False


@dataclass
class Run:
    """Holds the parts of a run on this rank.

    ``record`` is its configuration as checkpoints keep it, ``run_id`` its identity, and ``fingerprint`` what a resume compares.
    """

    loop: LoopSettings
    record: Mapping[str, Any]
    arch: BagelArch
    trainable: Trainable
    trained: Trained
    loader: PackLoader
    replacements: Replacements
    settings: StepSettings
    log: RunLog
    step_log: StepLog
    saving: Saving
    survival: Survival
    timers: Timers
    hooks: Hooks
    counters: Counters = field(default_factory=Counters)
    evaluation: Evaluation | None = None
    local: LocalCheckpoints | None = None
    run_id: str = ""
    fingerprint: Mapping[str, Any] = field(default_factory=dict)
    #: Steps done when the newest checkpoint was saved, or when this process started or resumed the run.
    saved_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.saved_steps = self.counters.steps


def train(run: Run) -> None:
    """Train until ``total_steps`` or until a signal requests a stop. The last state is always saved.

    Raises NoSampleLeft, after saving, if every sample has been trained on as often as it may before that.
    """
    with run.hooks:
        if run.loop.eval_at_start and run.counters.steps == 0 and run.evaluation is not None:
            _evaluate_now(run, run.evaluation)
        run.step_log.window.restart()
        while run.counters.steps < run.loop.total_steps and not run.survival.agreement.stop:
            try:
                advance(run)
            except NoSampleLeft:  # at the same step on every rank
                finish(run)
                raise
            evaluate(run)
            save_when_due(run)
        finish(run)


def advance(run: Run) -> None:
    """Train one step, and tell hooks and log. Raises NoSampleLeft if no sample is left for it."""
    start_time = time.perf_counter()
    table = run.step_log.table(run.counters.steps)
    run.hooks.before_step(run.counters.steps)
    batch = next_batch(run)
    result = step(run, batch, table)
    run.counters = run.counters.after(result, run.replacements.count, run.survival.bad_steps.count)
    done = StepDone(result, run.counters, time.perf_counter() - start_time)
    run.hooks.after_step(done)
    run.step_log.add(done, batch, table)


def next_batch(run: Run) -> StepBatch:
    """Return this replica's packs of the next step, with unreadable samples replaced."""
    with run.timers("data"):
        loaded = next(run.loader)
        if run.loop.overlap_vae_encode and run.counters.steps + 1 < run.loop.total_steps:
            run.loader.read_ahead()
        run.hooks.data_loaded()
        batch = run.replacements.settle(loaded, run.counters.steps, run.counters.samples)
        run.hooks.packs(batch.packs)
    run.hooks.batch_settled()
    return batch


def step(run: Run, batch: StepBatch, table: LossTable | None) -> StepResult:
    """Train on a batch and collect its losses by dataset in ``table``."""
    watch = StepWatch(run.counters.steps, run.survival.bad_steps, run.hooks.gradients_ready)
    # All ranks know by now whether this step is the last one.
    upcoming = run.loader.upcoming if not run.survival.agreement.stop else None
    return train_step(run.trainable, batch, run.settings, table, run.timers, watch, upcoming.packs if upcoming is not None else ())


def evaluate(run: Run) -> None:
    """Evaluate if an evaluation is due: every ``eval_every`` steps and after the last step."""
    steps = run.counters.steps
    if run.evaluation is not None and (steps % run.loop.eval_every == 0 or steps == run.loop.total_steps):
        _evaluate_now(run, run.evaluation)


def _evaluate_now(run: Run, evaluation: Evaluation) -> None:
    with paused(run, "eval", Pause.EVALUATION):
        numbers = evaluation.run(run.trainable, run.settings, run.log, run.counters.steps)
    run.hooks.evaluated(run.counters.steps, numbers)


def save_when_due(run: Run) -> None:
    """Publish a background save that has ended, and save if a checkpoint or a local checkpoint is due."""
    run.saving.poll()
    if run.saving.due(run.counters.steps):
        save(run)
    elif run.local is not None and run.local.due(run.counters.steps):
        with paused(run, "save", Pause.LOCAL_SAVE), synced_parameters(run.trainable.wrapped):
            run.local.save(run.counters.steps, run.trained, run_state(run))


def save(run: Run) -> None:
    """Write a checkpoint of the state after ``run.counters.steps`` steps. It is complete after ``run.saving.finish()`` at the latest."""
    with paused(run, "save", Pause.SAVE), synced_parameters(run.trainable.wrapped):
        run.saving.saver.save(run.counters.steps, run.trained, run_state(run))
    run.saved_steps = run.counters.steps


def finish(run: Run) -> None:
    """Save the state after the last step if it is not saved yet, and wait until everything is written."""
    run.survival.note_stop(run.counters.steps)
    if run.saved_steps != run.counters.steps:
        save(run)
    with run.hooks.pause(Pause.LAST_SAVE):
        run.saving.finish(exports=not run.survival.agreement.stop)
    if skipped := [f"{sample['where']} ({sample['reason']})" for sample in run.loader.skipped()]:
        run.log.info(f"{len(skipped)} samples were left out of training: {shorten(skipped, 20, '; ')}")


@contextmanager
def paused(run: Run, phase: str, pause: Pause) -> Iterator[None]:
    """Count the time within the block as ``phase`` of the timers and leave it out of the rates."""
    with run.step_log.window.excluded(), run.timers(phase), run.hooks.pause(pause):
        yield


def run_state(run: Run) -> dict[str, Any]:
    """Return everything that a run needs to continue and that is not a tensor."""
    counters = run.counters
    return {
        "schedule": run.trainable.learning_rate.state_dict(),
        "data": run.loader.state_dict(),
        "consumed_samples": counters.samples,
        "consumed_tokens": counters.tokens,
        "skipped_samples": counters.skipped,
        "bad_steps": run.survival.bad_steps.state_dict(),
        "config": run.record,
        FINGERPRINT: run.fingerprint,
        **({RUN_ID: run.run_id} if run.run_id else {}),
    }
