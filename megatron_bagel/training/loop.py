"""The training loop: data, step, log, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_bagel import platform
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.costs.flops import mfu_flops, peak_tflops, work_flops
from megatron_bagel.costs.freezing import FreezeSettings
from megatron_bagel.data.loading.loader import PackLoader, StepBatch
from megatron_bagel.platform.device import device_name
from megatron_bagel.training.evaluation.evaluator import Evaluation
from megatron_bagel.training.observability.logging_sinks import RunLog
from megatron_bagel.training.observability.loss_table import LossTable, losses_by_dataset
from megatron_bagel.training.observability.metrics import RateWindow, StepMetrics
from megatron_bagel.training.observability.profiling import ProfilerWindow
from megatron_bagel.training.observability.step_stats import compared_over_ranks, composition
from megatron_bagel.training.observability.timers import Timers
from megatron_bagel.training.optim.optimizer import synced_parameters
from megatron_bagel.training.resilience.run_monitors import Survival
from megatron_bagel.training.resilience.unreadable_samples import Replacements
from megatron_bagel.training.saving import Saving
from megatron_bagel.training.step import StepResult, StepSettings, StepWatch, Trainable, train_step

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints


@dataclass(frozen=True)
class LoopSettings:
    """What the loop itself is told.

    Attributes:
        total_steps: steps until the run is done.
        log_every: steps between log lines.
        eval_every: steps between evaluations, 0 for none.
        results_dir: folder of the list of unreadable samples.
        replicas: data-parallel replicas.
        frozen: what does not train, for the work of a step.
        max_skipped_share: a larger share of unreadable samples ends the run.
        peak_device_tflops: peak rate of a device; 0 looks it up by its name.
    """

    total_steps: int
    log_every: int
    eval_every: int
    results_dir: Path
    replicas: int
    frozen: FreezeSettings = field(default_factory=FreezeSettings)
    max_skipped_share: float = 0.01
    peak_device_tflops: float = 0.0


@dataclass
class Counters:
    """Progress that is not in any tensor: steps done, samples and tokens trained on, samples replaced because unreadable,
    updates left out."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0
    bad_steps: int = 0


@dataclass
class Run:
    """Everything a run consists of on this rank. ``record`` is the configuration as checkpoints keep it."""

    loop: LoopSettings
    record: Mapping[str, Any]
    arch: BagelArch
    trainable: Trainable
    trained: Trained
    loader: PackLoader
    settings: StepSettings
    log: RunLog
    saving: Saving
    survival: Survival
    timers: Timers
    profiler: ProfilerWindow
    counters: Counters = field(default_factory=Counters)
    evaluation: Evaluation | None = None
    local: LocalCheckpoints | None = None


def save(run: Run) -> None:
    """Write a checkpoint of the state after ``run.counters.steps`` steps, whole after ``run.saving.finish()`` if not before."""
    with run.survival.watchdog.slow("a save"), synced_parameters(run.trainable.wrapped):
        run.saving.saver.save(run.counters.steps, run.trained, run_state(run))


def save_locally(run: Run) -> None:
    """The same as each rank's own share, on a disk of its node."""
    with run.survival.watchdog.slow("a local save"), synced_parameters(run.trainable.wrapped):
        run.local.save(run.counters.steps, run.trained, run_state(run))


def run_state(run: Run) -> dict[str, Any]:
    """Everything that a run continues with and is no tensor."""
    counters = run.counters
    return {
        "schedule": run.trainable.learning_rate.state_dict(),
        "data": run.loader.state_dict(),
        "consumed_samples": counters.samples,
        "consumed_tokens": counters.tokens,
        "skipped_samples": counters.skipped,
        "bad_steps": run.survival.bad_steps.state_dict(),
        "config": run.record,
    }


def train(run: Run) -> None:
    """Step until ``total_steps``, or until a signal asks to stop; the last state is always saved."""
    settings, counters, survival = run.loop, run.counters, run.survival
    window = RateWindow(peak_tflops(device_name(), settings.peak_device_tflops), dist.get_world_size())
    skipped = settings.max_skipped_share, counters.skipped
    replacements = Replacements(run.loader, settings.results_dir, *skipped, next_step=counters.steps, agreement=survival.agreement)
    saved = counters.steps
    while counters.steps < settings.total_steps and not survival.agreement.stop:
        step, step_began = counters.steps, time.perf_counter()
        logged = step % settings.log_every == 0 or step + 1 == settings.total_steps
        table = LossTable([name for source in run.loader.reader.sources for name in source.datasets()]) if logged else None
        run.profiler.before(step)
        survival.stragglers.step_begins(step)
        with run.timers("data"):
            loaded = next(run.loader)
            survival.stragglers.data_came()
            batch = replacements.settle(loaded, step, counters.samples)
        survival.stragglers.compute_begins()
        watch = StepWatch(step, survival.bad_steps, survival.stragglers.gradients_ready)
        result = train_step(run.trainable, batch, run.settings, table, run.timers, watch)
        counters.steps += 1
        counters.samples += result.samples
        counters.tokens += result.work.tokens
        counters.skipped, counters.bad_steps = replacements.count, survival.bad_steps.count
        survival.step_done(counters.steps, time.perf_counter() - step_began, run.saving.saver.last_seconds)
        flops = work_flops(run.arch, result.work, settings.frozen.llm, settings.frozen.vit).total
        window.add(result.work.tokens, mfu_flops(run.arch.llm, result.work), flops)
        if table is not None:
            run.log.log(_metrics(step, result, counters, window, losses_by_dataset(table), _observed(run, batch, result, window.steps)))
        if run.evaluation is not None and (counters.steps % settings.eval_every == 0 or counters.steps == settings.total_steps):
            began = time.perf_counter()
            with run.timers("eval"), survival.watchdog.slow("an evaluation"):
                run.evaluation.run(run.trainable, run.settings, run.log, counters.steps)
            window.exclude(time.perf_counter() - began)
        run.saving.poll()
        if run.saving.due(counters.steps):
            began = time.perf_counter()
            with run.timers("save"):
                save(run)
            saved = counters.steps
            window.exclude(time.perf_counter() - began)
        elif run.local is not None and run.local.due(counters.steps):
            began = time.perf_counter()
            with run.timers("save"):
                save_locally(run)
            window.exclude(time.perf_counter() - began)
    survival.note_stop(counters.steps)
    if saved != counters.steps:
        save(run)
    with survival.watchdog.slow("the last save"):
        run.saving.finish(exports=not survival.agreement.stop)
    _report_skipped(run)


def _observed(run: Run, batch: StepBatch, result: StepResult, steps: int) -> dict[str, float]:
    """How the ``steps`` steps since the last log line went. Collective over the world."""
    found = composition(result.work, result.tasks, len(batch.plans), run.settings.seq_length)
    return found | compared_over_ranks(run.timers.read(steps), batch, result.work.tokens, run.loop.replicas)


def _metrics(
    step: int, result: StepResult, counters: Counters, window: RateWindow, by_dataset: Mapping[str, float], observed: Mapping[str, float]
) -> StepMetrics:
    rates = window.close()
    return StepMetrics(
        step=step,
        loss=result.losses.loss,
        ce=result.losses.ce,
        mse=result.losses.mse,
        grad_norm=result.outcome.grad_norm,
        lr=result.lr,
        consumed_samples=counters.samples,
        consumed_tokens=counters.tokens,
        ce_tokens=result.totals.ce_tokens,
        mse_tokens=result.totals.mse_tokens,
        step_time_s=rates.step_time_s,
        tokens_per_s=rates.tokens_per_s,
        tflops=rates.tflops,
        mfu=rates.mfu,
        peak_mem_bytes=platform.peak_memory_bytes(),
        step_tokens=result.work.tokens,
        step_samples=result.samples,
        work_tflops=rates.work_tflops,
        work_mfu=rates.work_mfu,
        skipped_samples=counters.skipped,
        bad_steps=counters.bad_steps,
        by_dataset=by_dataset,
        observed=observed,
    )


def _report_skipped(run: Run) -> None:
    for skipped in run.loader.planner.skipped():
        run.log.info(f"left out of training: {skipped}")
