"""A whole run: process groups, model, data, optimizer, and the weights or the checkpoint it starts from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_bagel import platform
from megatron_bagel.assembly.training_modules import run_model
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks, virtual_stages
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import ResolvedRun, architecture, resolve
from megatron_bagel.config.validate import validate_architecture
from megatron_bagel.costs.flops import peak_tflops
from megatron_bagel.data.loading.build import ensure_index, open_loader
from megatron_bagel.data.loading.encoder_assignment import EncoderCosts, EncodingShare
from megatron_bagel.data.loading.loader import PackLoader
from megatron_bagel.parallel.replica import make_replica
from megatron_bagel.platform.device import device_name
from megatron_bagel.platform.launch.fake_world import is_fake
from megatron_bagel.training.evaluation.evaluator import Evaluation
from megatron_bagel.training.loop import LoopSettings, Run, train
from megatron_bagel.training.losses import LossWeights
from megatron_bagel.training.observability.logging_sinks import RunLog, WandbSettings, package_log
from megatron_bagel.training.observability.metrics import RateWindow
from megatron_bagel.training.observability.step_log import StepLog, StepLogSettings
from megatron_bagel.training.observability.timers import Timers
from megatron_bagel.training.optim.optimizer import trainable_parameters
from megatron_bagel.training.resilience.config_fingerprint import check_same_everywhere
from megatron_bagel.training.resilience.run_monitors import Survival, surviving
from megatron_bagel.training.resilience.unreadable_samples import Replacements
from megatron_bagel.training.saving import Saving
from megatron_bagel.training.setup.build import build_trainable
from megatron_bagel.training.setup.hooks import build_hooks
from megatron_bagel.training.setup.launcher_restarts import resume_after_restart
from megatron_bagel.training.setup.resume import continue_from, local_checkpoints
from megatron_bagel.training.setup.starting_point import starting_point
from megatron_bagel.training.step import StepSettings, Trainable
from megatron_bagel.training.step_result import Counters


def execute(config: Config) -> None:
    """A whole run in an initialised process group. Raises ValueError for settings, data or weights that cannot work."""
    check_same_everywhere(config)
    with surviving(config) as survival, package_log(config.training.results_dir, dist.get_rank()):
        initialize_parallel(config)
        run = set_up(config, survival)
        try:
            train(run)
        finally:
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
    timers, saving = Timers(config.observing.barrier_timers), Saving(training)
    run = Run(
        loop=LoopSettings(training.total_steps, training.eval_every),
        record=config.to_dict(),
        arch=arch,
        trainable=trainable,
        trained=trained,
        loader=loader,
        replacements=_replacements(config, loader, counters, survival),
        settings=step_settings(config, layout),
        log=log,
        step_log=step_log(config, layout, arch, loader, log, timers),
        saving=saving,
        survival=survival,
        timers=timers,
        hooks=build_hooks(config, survival, saving),
        counters=counters,
        local=local,
    )
    if training.eval_every:
        run.evaluation = Evaluation(config, arch, tokenizer, layout.num_microbatches)
    _announce(config, layout, run, continued.told)
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


def step_log(config: Config, layout: ResolvedRun, arch: BagelArch, loader: PackLoader, log: RunLog, timers: Timers) -> StepLog:
    """What makes the records of a run."""
    training = config.training
    settings = StepLogSettings(
        training.log_every, training.total_steps, config.data.max_num_tokens, layout.data_parallel_size, training.freeze_llm,
        training.freeze_vit,
    )  # fmt: skip
    window = RateWindow(peak_tflops(device_name(), training.peak_device_tflops), dist.get_world_size())
    datasets = [name for source in loader.reader.sources for name in source.datasets()]
    return StepLog(settings, arch, datasets, log, timers, window)


def _replacements(config: Config, loader: PackLoader, counters: Counters, survival: Survival) -> Replacements:
    return Replacements(
        loader, config.training.results_dir, config.data.max_skipped_share, counters.skipped, counters.steps, survival.agreement
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


def _announce(config: Config, layout: ResolvedRun, run: Run, start: str) -> None:
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
