"""A whole run: process groups, model, data, optimizer, and the weights or the checkpoint it starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.config.record import write_record
from megatron_bagel.costs.flops import peak_tflops
from megatron_bagel.data.loading.build import ensure_index, open_loader
from megatron_bagel.data.loading.encoder_assignment import EncoderCosts, EncodingShare
from megatron_bagel.data.loading.loader import PackLoader
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
from megatron_bagel.training.resilience.run_monitors import Survival, surviving
from megatron_bagel.training.resilience.unreadable_samples import Replacements
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.saving import Saving
from megatron_bagel.training.setup.build import build_trainable
from megatron_bagel.training.setup.hooks import build_hooks
from megatron_bagel.training.setup.launcher_restarts import resume_after_restart
from megatron_bagel.training.setup.resume import continue_from, local_checkpoints
from megatron_bagel.training.setup.starting_point import starting_point
from megatron_bagel.training.step import Trainable
from megatron_bagel.training.step_result import Counters


def execute(resolved: ResolvedRun) -> None:
    """A whole run in an initialised process group. Raises ValueError for settings, data or weights that cannot work."""
    check_same_everywhere(resolved.record)
    with surviving(resolved.resilience) as survival, package_log(resolved.results_dir, dist.get_rank()):
        initialize_parallel(resolved)
        run = set_up(resolved, survival)
        try:
            train(run)
        finally:
            run.loader.close()
            run.log.close()


def initialize_parallel(resolved: ResolvedRun) -> None:
    """Megatron-Core's process groups and random states. Nothing of a result depends on the latter: every draw here is keyed."""
    megatron = resolved.megatron
    parallel_state.initialize_model_parallel(
        megatron.tensor_model_parallel_size,
        megatron.pipeline_model_parallel_size,
        virtual_stages(megatron, resolved.arch.llm.num_hidden_layers),
        context_parallel_size=megatron.context_parallel_size,
        num_distributed_optimizer_instances=resolved.sizes.distributed_optimizer_instances,
        create_gloo_process_groups=not is_fake(),
        # Until the first step is done; then they are cut to what the flag says (run_monitors.py).
        distributed_timeout_minutes=math.ceil(resolved.resilience.first_collective_minutes),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(resolved.seed)


def set_up(resolved: ResolvedRun, survival: Survival | None = None) -> Run:
    """Build a run from its settings: model, data, optimizer, and the weights or the checkpoint it starts from."""
    arch, sizes, tokenizer, rank = resolved.arch, resolved.sizes, resolved.tokenizer, dist.get_rank()
    survival = survival or Survival.of(resolved.resilience)
    resolved = replace(resolved, start=resume_after_restart(resolved.start, resolved.results_dir))
    source = starting_point(resolved.start)
    _ensure_index(resolved)
    replica, share = encoding_share(resolved)
    place = parallel_state.get_data_parallel_rank()
    loader = open_loader(resolved.data, arch, tokenizer, sizes.batch_sizes, place, sizes.data_parallel_size, share)
    grace = resolved.resilience.grace_seconds
    loader.give_up_after(survival.agreement.request, None if grace is None else grace / 2)
    trainable, trained = build_trainable(resolved, source, replica, share)
    local = local_checkpoints(resolved.local_checkpoints, resolved.start.checkpoint_dir)
    continued = continue_from(resolved.start, source, trained, local)
    counters = _restore(continued.state, continued.steps, trainable, loader, survival) if continued.state is not None else Counters()
    observing = resolved.observing
    log = RunLog(
        resolved.results_dir, rank, counters.steps, resolved.record, wandb=resolved.wandb, prometheus=observing.prometheus_file
    )  # fmt: skip
    timers, saving = Timers(observing.barrier_timers), Saving(resolved.saving)
    run = Run(
        loop=resolved.loop,
        record=resolved.record,
        arch=arch,
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
    )
    if resolved.evaluation is not None:
        run.evaluation = Evaluation(resolved.evaluation, resolved.data, arch, tokenizer, sizes.num_microbatches)
    _announce(resolved, run, continued.told)
    return run


def _ensure_index(resolved: ResolvedRun) -> None:
    """Make the index, where there is none, on rank 0. Indexing may take longer than a collective of training ever should."""
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=24))
    if dist.get_rank() == 0:
        ensure_index(resolved.data, resolved.tokenizer)
    dist.barrier(patient)
    dist.destroy_process_group(patient)


def encoding_share(resolved: ResolvedRun) -> tuple[Replica | None, EncodingShare | None]:
    """The replica of this rank and its share of the encoding of images, where the ranks of a replica share it. Collective."""
    if not encoders_on_all_ranks(resolved.megatron):
        return None, None
    replica = make_replica()
    costs = EncoderCosts.of(resolved.arch, frozen_vit=not resolved.build.frozen.tower_backward)
    return replica, EncodingShare(replica.rank, replica.size, costs)


def step_log(resolved: ResolvedRun, loader: PackLoader, log: RunLog, timers: Timers) -> StepLog:
    """Return what makes the records of a run."""
    window = RateWindow(peak_tflops(device_name(), resolved.peak_device_tflops), dist.get_world_size())
    datasets = [name for source in loader.reader.sources for name in source.datasets()]
    return StepLog(resolved.step_log, resolved.arch, datasets, log, timers, window)


def _replacements(resolved: ResolvedRun, loader: PackLoader, counters: Counters, survival: Survival) -> Replacements:
    return Replacements(loader, resolved.results_dir, resolved.max_skipped_share, counters.skipped, counters.steps, survival.agreement)


def _restore(state: Mapping[str, Any], steps: int, trainable: Trainable, loader: PackLoader, survival: Survival) -> Counters:
    """Take over what is no tensor; returns how far the run is."""
    trainable.learning_rate.load_state_dict(state["schedule"])
    loader.load_state_dict(state["data"])
    if "bad_steps" in state:  # earlier versions had none
        survival.bad_steps.load_state_dict(state["bad_steps"])
    return Counters(steps, state["consumed_samples"], state["consumed_tokens"], state["skipped_samples"])


def _announce(resolved: ResolvedRun, run: Run, start: str) -> None:
    sizes = resolved.sizes
    if dist.get_rank() == 0:
        write_record(resolved.record, resolved.results_dir / "config.yaml")
    run.log.info(start)
    trained = sum(trainable_parameters(part) for part in run.trainable.wrapped)
    total = sum(p.numel() for part in run.trained.modules.values() for p in part.parameters())
    run.log.info(
        f"{total / 1e6:.2f} M parameters on this rank, {trained / 1e6:.2f} M of them train; {sizes.data_parallel_size} replicas x "
        f"{sizes.num_microbatches} packs of {resolved.step.seq_length} tokens per step; attention {sizes.attention_backend}"
    )
    for note in sizes.notes:
        run.log.info(note)
