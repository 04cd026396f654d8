# SPDX-License-Identifier: Apache-2.0
"""Sets up a run and executes it: process groups, model, data, optimizer, and the weights or the checkpoint it starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_bagel.assembly.starting_weights import WeightSource
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.config.record import write_record
from megatron_bagel.costs.flops import peak_tflops
from megatron_bagel.data.loading.build import ensure_index, open_loader
from megatron_bagel.data.loading.encoder_assignment import EncoderCosts, EncodingShare
from megatron_bagel.data.loading.fingerprint import data_fingerprint
from megatron_bagel.data.loading.loader import PackLoader
from megatron_bagel.parallel.host_sums import create_host_group
from megatron_bagel.parallel.replica import Replica, make_replica
from megatron_bagel.platform.device import device_name
from megatron_bagel.platform.launch.fake_world import is_fake
from megatron_bagel.training.evaluation.evaluator import Evaluation
from megatron_bagel.training.loop import Run, train
from megatron_bagel.training.observability.logging_sinks import RunLog, package_log
from megatron_bagel.training.observability.metrics import RateWindow
from megatron_bagel.training.observability.step_log import StepLog
from megatron_bagel.training.observability.timers import Timers
from megatron_bagel.training.optim.optimizer import trainable_parameters
from megatron_bagel.training.resilience.config_fingerprint import check_same_everywhere
from megatron_bagel.training.resilience.resume_fingerprint import run_fingerprint
from megatron_bagel.training.resilience.run_monitors import Survival, surviving
from megatron_bagel.training.resilience.unreadable_samples import Replacements
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.saving import Saving
from megatron_bagel.training.setup.build import build_trainable
from megatron_bagel.training.setup.check_resume import check_resume
from megatron_bagel.training.setup.hooks import build_hooks
from megatron_bagel.training.setup.resume import continue_from, local_checkpoints
from megatron_bagel.training.setup.run_folders import RunFolders, taken_folders
from megatron_bagel.training.setup.starting_point import starting_point
from megatron_bagel.training.step import Trainable
from megatron_bagel.training.step_result import Counters

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints


def execute(resolved: ResolvedRun) -> None:
    """Set up a run in an initialised process group and train. Raises ValueError for settings, data or weights that cannot work."""
    check_same_everywhere(resolved.record)
    with (
        taken_folders(resolved.start, resolved.results_dir) as folders,
        surviving(resolved.resilience) as survival,
        package_log(resolved.results_dir, dist.get_rank()),
    ):
        initialize_parallel(resolved)
        run = set_up(resolved, survival, folders)
        try:
            train(run)
        finally:
            run.loader.close()
            run.log.close()


def initialize_parallel(resolved: ResolvedRun) -> None:
    """Initialise Megatron-Core's process groups and random states. No result depends on the latter, because every draw is keyed."""
    megatron = resolved.megatron
    # Valid until the first step is done; run_monitors.py then sets the time-out that the flag gives.
    minutes = math.ceil(resolved.resilience.first_collective_minutes)
    parallel_state.initialize_model_parallel(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        virtual_stages(megatron, resolved.arch.llm.num_hidden_layers),
        context_parallel_size=megatron.context_parallel_size,
        expert_model_parallel_size=megatron.expert_model_parallel_size,
        expert_tensor_parallel_size=megatron.expert_tensor_parallel_size,
        num_distributed_optimizer_instances=resolved.sizes.distributed_optimizer_instances,
        create_gloo_process_groups=not is_fake(),
        distributed_timeout_minutes=minutes,
    )
    create_host_group(minutes)
    tensor_parallel.model_parallel_cuda_manual_seed(resolved.seed)


def set_up(resolved: ResolvedRun, survival: Survival | None = None, folders: RunFolders | None = None) -> Run:
    """Build a run from its settings: model, data, optimizer, and the weights or the checkpoint it starts from.

    ``folders`` are those that the run has taken. Without them it has no identity and is not protected from another run.
    """
    survival = survival or Survival.of(resolved.resilience)
    folders = folders or RunFolders(resolved.start)
    resolved = replace(resolved, start=folders.start)
    source = starting_point(resolved.start)
    _ensure_index(resolved)
    replica, share = encoding_share(resolved)
    loader = _loader(resolved, share)
    grace = resolved.resilience.grace_seconds
    loader.give_up_after(survival.agreement.request, None if grace is None else grace / 2)
    fingerprint = _checked_fingerprint(resolved, source, loader)
    trainable, trained = build_trainable(resolved, source, replica, share)
    local = local_checkpoints(resolved.local_checkpoints, resolved.start.checkpoint_dir)
    continued = continue_from(resolved.start, source, trained, local)
    counters = _restore(continued.state, continued.steps, trainable, loader, survival) if continued.state is not None else Counters()
    run = _assemble(resolved, survival, counters, loader, trainable, trained, local, folders, fingerprint)
    for note in folders.notes:
        run.log.info(note)
    _announce(resolved, run, continued.message)
    return run


def _assemble(
    resolved: ResolvedRun,
    survival: Survival,
    counters: Counters,
    loader: PackLoader,
    trainable: Trainable,
    trained: Trained,
    local: LocalCheckpoints | None,
    folders: RunFolders,
    fingerprint: Mapping[str, Any],
) -> Run:
    """Connect the data, the model and its state with what logs, saves, watches and evaluates them."""
    observing = resolved.observing
    log = RunLog(
        resolved.results_dir, dist.get_rank(), counters.steps, resolved.record, wandb=resolved.wandb, prometheus=observing.prometheus_file,
        trackers=resolved.trackers, run_id=folders.run_id,
    )  # fmt: skip
    timers, saving = Timers(observing.barrier_timers), Saving(resolved.saving, folders.run_id, folders.check)
    return Run(
        loop=resolved.loop,
        record=resolved.record,
        arch=resolved.arch,
        trainable=trainable,
        trained=trained,
        loader=loader,
        replacements=_replacements(resolved, loader, counters, survival),
        settings=resolved.step,
        log=log,
        step_log=step_log(resolved, loader, log, timers),
        saving=saving,
        survival=survival,
        timers=timers,
        hooks=build_hooks(resolved, survival, saving),
        counters=counters,
        local=local,
        evaluation=_evaluation(resolved),
        run_id=folders.run_id,
        fingerprint=fingerprint,
    )


def _ensure_index(resolved: ResolvedRun) -> None:
    """Build the index on rank 0 if there is none. The time-out is long, because indexing may take far longer than any collective."""
    waiting_group = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    if dist.get_rank() == 0:
        ensure_index(resolved.data, resolved.tokenizer)
    dist.barrier(waiting_group)
    dist.destroy_process_group(waiting_group)


def encoding_share(resolved: ResolvedRun) -> tuple[Replica | None, EncodingShare | None]:
    """Return this rank's replica and its share of the encoding of images, or None twice if replicas do not share it. Collective."""
    if not encoders_on_all_ranks(resolved.megatron):
        return None, None
    replica = make_replica()
    costs = EncoderCosts.of(resolved.arch, frozen_vit=not resolved.build.frozen.tower_backward)
    return replica, EncodingShare(replica.rank, replica.size, costs)


def step_log(resolved: ResolvedRun, loader: PackLoader, log: RunLog, timers: Timers) -> StepLog:
    """Return the log that makes the records of a run's steps."""
    window = RateWindow(peak_tflops(device_name(), resolved.peak_device_tflops), dist.get_world_size())
    datasets = [name for source in loader.reader.sources for name in source.datasets()]
    return StepLog(resolved.step_log, resolved.arch, datasets, log, timers, window)


def _loader(resolved: ResolvedRun, share: EncodingShare | None) -> PackLoader:
    """Open the loader of this rank's data-parallel replica."""
    sizes, replica = resolved.sizes, parallel_state.get_data_parallel_rank()
    return open_loader(resolved.data, resolved.arch, resolved.tokenizer, sizes.batch_sizes, replica, sizes.data_parallel_size, share)


def _checked_fingerprint(resolved: ResolvedRun, source: WeightSource, loader: PackLoader) -> Mapping[str, Any]:
    """Return what identifies the run. Raises ValueError if a part that must match differs from the checkpoint that it continues."""
    sources = loader.reader.sources
    fingerprint = run_fingerprint(resolved.record, resolved.sizes, resolved.tokenizer.fingerprint, data_fingerprint(sources))
    if source.checkpoint is not None:
        check_resume(source.checkpoint, fingerprint, [group.name for group in sources if not group.keep_position])
    return fingerprint


def _evaluation(resolved: ResolvedRun) -> Evaluation | None:
    """Return what evaluates the run, or None in a run without evaluations."""
    if resolved.evaluation is None:
        return None
    return Evaluation(resolved.evaluation, resolved.data, resolved.arch, resolved.tokenizer, resolved.sizes.num_microbatches)


def _replacements(resolved: ResolvedRun, loader: PackLoader, counters: Counters, survival: Survival) -> Replacements:
    return Replacements(loader, resolved.results_dir, resolved.max_skipped_share, counters.skipped, counters.steps, survival.agreement)


def _restore(state: Mapping[str, Any], steps: int, trainable: Trainable, loader: PackLoader, survival: Survival) -> Counters:
    """Restore the state that is not a tensor and return the progress of the run."""
    trainable.learning_rate.load_state_dict(state["schedule"])
    loader.load_state_dict(state["data"])
    if "bad_steps" in state:  # earlier versions had none
        survival.bad_steps.load_state_dict(state["bad_steps"])
    return Counters(steps, state["consumed_samples"], state["consumed_tokens"], state["skipped_samples"])


def _announce(resolved: ResolvedRun, run: Run, start_message: str) -> None:
    """Log where the run starts and its sizes, and write its configuration."""
    sizes = resolved.sizes
    if dist.get_rank() == 0:
        write_record(resolved.record, resolved.results_dir / "config.yaml")
    run.log.info(start_message)
    num_trained = sum(trainable_parameters(part) for part in run.trainable.wrapped)
    num_total = sum(p.numel() for part in run.trained.modules.values() for p in part.parameters())
    run.log.info(
        f"{num_total / 1e6:.2f} M parameters on this rank, {num_trained / 1e6:.2f} M of them trained; {sizes.data_parallel_size} replicas "
        f"x {sizes.num_microbatches} packs of {resolved.step.seq_length} tokens per step; attention {sizes.attention_backend}"
    )
    if run.counters.steps >= run.loop.total_steps:
        run.log.info(f"nothing to train: {run.counters.steps} steps are done and --total_steps is {run.loop.total_steps}; raise it")
    for note in sizes.notes:
        run.log.info(note)
