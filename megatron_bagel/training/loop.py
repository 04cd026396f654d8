"""The training loop: set everything up, continue where a checkpoint stands, step, log, save. Reads top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_bagel import platform
from megatron_bagel.assembly.training_modules import run_model
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import ResolvedRun, architecture, resolve
from megatron_bagel.config.validate import validate_architecture
from megatron_bagel.costs.flops import mfu_flops, peak_tflops, work_flops
from megatron_bagel.data.loading.build import ensure_index, open_loader
from megatron_bagel.data.loading.encoder_assignment import EncoderCosts, EncodingShare
from megatron_bagel.data.loading.loader import PackLoader, StepBatch
from megatron_bagel.parallel.replica import make_replica
from megatron_bagel.platform.device import device_name
from megatron_bagel.platform.launch.fake_world import is_fake
from megatron_bagel.training.evaluation.evaluator import Evaluation
from megatron_bagel.training.losses import LossWeights
from megatron_bagel.training.observability.logging_sinks import RunLog, WandbSettings, package_log
from megatron_bagel.training.observability.loss_table import LossTable, losses_by_dataset
from megatron_bagel.training.observability.metrics import RateWindow, StepMetrics
from megatron_bagel.training.observability.profiling import ProfilerWindow
from megatron_bagel.training.observability.step_stats import compared_over_ranks, composition
from megatron_bagel.training.observability.timers import Timers
from megatron_bagel.training.optim.optimizer import synced_parameters, trainable_parameters
from megatron_bagel.training.resilience.config_fingerprint import check_same_everywhere
from megatron_bagel.training.resilience.run_monitors import Survival, surviving
from megatron_bagel.training.resilience.unreadable_samples import Replacements
from megatron_bagel.training.saving import Saving
from megatron_bagel.training.setup.build import build_trainable
from megatron_bagel.training.setup.launcher_restarts import resume_after_restart
from megatron_bagel.training.setup.resume import continue_from, local_checkpoints
from megatron_bagel.training.setup.starting_point import starting_point
from megatron_bagel.training.step import StepResult, StepSettings, StepWatch, Trainable, train_step

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints


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
    """Everything a run consists of on this rank."""

    config: Config
    layout: ResolvedRun
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


def execute(config: Config) -> None:
    """A whole run in an initialised process group. Raises ValueError for settings, data or weights that cannot work."""
    check_same_everywhere(config)
    with surviving(config) as survival, package_log(config.training.results_dir, dist.get_rank()):
        initialize_parallel(config)
        run = set_up(config, survival)
        try:
            train(run)
        finally:
            run.profiler.close()
            run.loader.close()
            run.log.close()


def initialize_parallel(config: Config) -> None:
    """Megatron-Core's process groups and random states. Nothing of a result depends on the latter: every draw here is keyed."""
    megatron = config.megatron
    parallel_state.initialize_model_parallel(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        virtual_stages(megatron, architecture(config).llm.num_hidden_layers),
        context_parallel_size=megatron.context_parallel_size,
        num_distributed_optimizer_instances=resolve(config, dist.get_world_size(), platform.has_gpu()).distributed_optimizer_instances,
        create_gloo_process_groups=not is_fake(),
        # Until the first step is done; then they are cut to what the flag says (run_monitors.py).
        distributed_timeout_minutes=math.ceil(max(megatron.distributed_timeout_minutes, config.resilience.first_step_timeout_minutes)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.training.global_seed)


def set_up(config: Config, survival: Survival | None = None) -> Run:
    """Build a run from its settings: model, data, optimizer, and the weights or the checkpoint it starts from."""
    training, rank = config.training, dist.get_rank()
    survival = survival or Survival.of(config)
    layout = resolve(config, dist.get_world_size(), platform.has_gpu())
    arch, tokenizer = run_model(config)
    validate_architecture(config, arch)
    resume_after_restart(config)
    source = starting_point(config)
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    if rank == 0:
        ensure_index(config, tokenizer)
    # Indexing may take longer than a collective of training ever should.
    dist.barrier(patient)
    dist.destroy_process_group(patient)
    place = parallel_state.get_data_parallel_rank()
    replica = make_replica() if encoders_on_all_ranks(config.megatron) else None
    costs = EncoderCosts.of(arch, training.freeze_vit or training.freeze_und)
    share = EncodingShare(replica.rank, replica.size, costs) if replica is not None else None
    loader = open_loader(config, arch, tokenizer, layout.batch_sizes, place, layout.data_parallel_size, share)
    trainable, trained = build_trainable(config, layout, arch, source, replica, share)
    local = local_checkpoints(config)
    continued = continue_from(config, source, trained, local)
    counters = _restore(continued.state, continued.steps, trainable, loader, survival) if continued.state is not None else Counters()
    log = RunLog(
        training.results_dir, rank, counters.steps, config.to_dict(), wandb=_wandb(config) if layout.use_wandb else None,
        prometheus=config.observing.prometheus_file,
    )  # fmt: skip
    timers, profiler = Timers(config.observing.barrier_timers), ProfilerWindow(config.observing, training.results_dir, rank)
    saving, settings = Saving(training), step_settings(config, layout)
    run = Run(config, layout, arch, trainable, trained, loader, settings, log, saving, survival, timers, profiler, counters, local=local)
    if training.eval_every:
        run.evaluation = Evaluation(config, arch, tokenizer, layout.num_microbatches)
    _announce(run, continued.told)
    return run


def step_settings(config: Config, layout: ResolvedRun) -> StepSettings:
    """What every step of a run is told."""
    training, megatron = config.training, config.megatron
    return StepSettings(
        LossWeights(training.ce_weight, training.mse_weight, training.ce_loss_reweighting),
        layout.attention_backend,
        config.data.max_num_tokens,
        platform.device(),
        slot_multiple=megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1,
        fixed_slots=megatron.pipeline_model_parallel_size > 1,
        cp_comm_type=megatron.cp_comm_type,
    )


def _restore(state: Mapping[str, Any], steps: int, trainable: Trainable, loader: PackLoader, survival: Survival) -> Counters:
    """Take over what is no tensor; returns how far the run is."""
    trainable.learning_rate.load_state_dict(state["schedule"])
    loader.load_state_dict(state["data"])
    if "bad_steps" in state:  # earlier versions had none
        survival.bad_steps.load_state_dict(state["bad_steps"])
    return Counters(steps, state["consumed_samples"], state["consumed_tokens"], state["skipped_samples"])


def _wandb(config: Config) -> WandbSettings:
    training = config.training
    return WandbSettings(training.wandb_project, training.wandb_name, training.wandb_runid, training.wandb_resume, training.wandb_offline)


def _announce(run: Run, start: str) -> None:
    config, layout = run.config, run.layout
    if dist.get_rank() == 0:
        config.save(Path(config.training.results_dir) / "config.yaml")
    run.log.info(start)
    trained = sum(trainable_parameters(part) for part in run.trainable.wrapped)
    total = sum(p.numel() for part in run.trained.modules.values() for p in part.parameters())
    run.log.info(
        f"{total / 1e6:.2f} M parameters on this rank, {trained / 1e6:.2f} M of them train; {layout.data_parallel_size} replicas x "
        f"{layout.num_microbatches} packs of {config.data.max_num_tokens} tokens per step; attention {layout.attention_backend}"
    )
    for note in layout.notes:
        run.log.info(note)


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
        "config": run.config.to_dict(),
    }


def train(run: Run) -> None:
    """Step until ``total_steps``, or until a signal asks to stop; the last state is always saved."""
    training, counters, survival = run.config.training, run.counters, run.survival
    window = RateWindow(peak_tflops(device_name(), training.peak_device_tflops), dist.get_world_size())
    skipped = run.config.data.max_skipped_share, counters.skipped
    replacements = Replacements(run.loader, training.results_dir, *skipped, next_step=counters.steps, agreement=survival.agreement)
    saved = counters.steps
    while counters.steps < training.total_steps and not survival.agreement.stop:
        step, step_began = counters.steps, time.perf_counter()
        logged = step % training.log_every == 0 or step + 1 == training.total_steps
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
        flops = work_flops(run.arch, result.work, training.freeze_llm, training.freeze_vit).total
        window.add(result.work.tokens, mfu_flops(run.arch.llm, result.work), flops)
        if table is not None:
            run.log.log(_metrics(step, result, counters, window, losses_by_dataset(table), _observed(run, batch, result, window.steps)))
        if run.evaluation is not None and (counters.steps % training.eval_every == 0 or counters.steps == training.total_steps):
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
    found = composition(result.work, result.tasks, len(batch.plans), run.config.data.max_num_tokens)
    return found | compared_over_ranks(run.timers.read(steps), batch, result.work.tokens, run.layout.data_parallel_size)


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
