# SPDX-License-Identifier: Apache-2.0
"""The resolved run from a configuration: the one place where flags become settings of components.

This module imports every component, and Megatron-Core with them. So the platform must be installed first.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_bagel import platform
from megatron_bagel.assembly.modules import BuildSettings
from megatron_bagel.assembly.starting_weights import InitialSettings, StartSettings
from megatron_bagel.checkpoint.dist.local_files import LocalCheckpointSettings
from megatron_bagel.checkpoint.dist.saver import SaveSettings
from megatron_bagel.checkpoint.hf.pretrained import grown_vocabulary
from megatron_bagel.cli.console import absent_speedups
from megatron_bagel.cli.cost_settings import freeze_settings
from megatron_bagel.cli.data_settings import data_settings
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.fp8 import check_fp8_gpu
from megatron_bagel.config.kernel_rules import check_compiled_kernels
from megatron_bagel.config.magi_rules import check_magi_machine
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.offload_rules import check_offload_package
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import ResolvedSizes, autoencoder_path, resolve, tokenizer_path
from megatron_bagel.config.validate import validate_architecture
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.encoders.image_encoding import ImageEncoderSettings
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image_sampling import ImageSampling
from megatron_bagel.planning.encoder_memory import encoder_memory_of_a_run
from megatron_bagel.platform.device import compute_capability, device_memory_bytes, device_name
from megatron_bagel.training.evaluation.evaluator import EvaluationSettings
from megatron_bagel.training.loop import LoopSettings
from megatron_bagel.training.losses import LossWeights
from megatron_bagel.training.observability.logging_sinks import WandbSettings
from megatron_bagel.training.observability.step_log import StepLogSettings
from megatron_bagel.training.observability.trackers import TrackerSettings
from megatron_bagel.training.optim.lr_schedule import ScheduleSettings
from megatron_bagel.training.optim.optimizer import OptimizerSettings
from megatron_bagel.training.resilience.bad_steps import BadStepSettings
from megatron_bagel.training.resilience.hang_watchdog import COMMAND, Limits
from megatron_bagel.training.resilience.run_monitors import ResilienceSettings
from megatron_bagel.training.resilience.stragglers import StragglerSettings
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.saving import SavingSettings
from megatron_bagel.training.step import StepSettings


def resolve_run(config: Config, arch: BagelArch, world_size: int, has_gpu: bool, command: str = COMMAND) -> ResolvedRun:
    """Return the settings of every component of a run.

    Args:
        config: Settings of the run, which have passed ``validate``.
        arch: The model that ``validate`` read.
        world_size: Number of ranks.
        has_gpu: Whether the run uses GPUs.
        command: Name of the command in its messages.

    Raises:
        ValueError: if the tokenizer cannot be read, or tensor parallelism cannot divide the model with its vocabulary.
    """
    training, sizes = config.training, sizes_with_notes(config, world_size, has_gpu)
    tokenizer, grown_arch = tokenizer_and_model(config, arch)
    check_fp8_gpu(config.megatron, compute_capability(), device_name())
    check_magi_machine(config.megatron, compute_capability(), device_name())
    check_offload_package(config.megatron)
    if not config.megatron.dry_run:  # which computes nothing, so it compiles nothing
        check_compiled_kernels(config.megatron, training, has_gpu)
    costs = CostInputs(grown_arch, config.megatron, sizes, config.data.max_num_tokens, freeze_settings(config))
    megatron = encoder_memory_of_a_run(costs, device_memory_bytes())
    if (config.megatron.encoder_memory, megatron.encoder_memory) == ("auto", "constant"):
        note = "encoder_memory: constant; the activations of the vision tower for a whole step would not fit (choose with --encoder_memory)"
        sizes = replace(sizes, notes=(*sizes.notes, note))
    run = ResolvedRun(
        record=record_of(config),
        arch=grown_arch,
        tokenizer=tokenizer,
        megatron=megatron,
        sizes=sizes,
        seed=training.global_seed,
        results_dir=Path(training.results_dir),
        data=data_settings(config),
        start=start_settings(config),
        build=build_settings(config),
        encoding=encoding_settings(config, megatron),
        optimizer=optimizer_settings(config, sizes),
        schedule=schedule_settings(config),
        ema_decay=training.ema,
        step=step_settings(config, sizes),
        loop=LoopSettings(training.total_steps, training.eval_every, training.eval_at_start, megatron.overlap_vae_encode),
        step_log=step_log_settings(config, sizes),
        max_skipped_share=config.data.max_skipped_share,
        peak_device_tflops=training.peak_device_tflops,
        saving=saving_settings(config),
        resilience=resilience_settings(config, command),
        observing=config.observing,
    )
    return with_optional_components(replace(run, new_tokens=new_tokens(config, tokenizer, arch)), config)


def sizes_with_notes(config: Config, world_size: int, has_gpu: bool) -> ResolvedSizes:
    """Return the derived settings. Their lines for the start-up log name the optional speed-ups that are not installed."""
    sizes = resolve(config, world_size, has_gpu)
    notes = [absent_speedups(), one_queue_note(config) if has_gpu else None]
    return replace(sizes, notes=(*sizes.notes, *(note for note in notes if note is not None)))


def one_queue_note(config: Config) -> str | None:
    """Return what to know of ``--overlap_vae_encode`` where all streams of a GPU share one hardware queue, or None."""
    if not config.megatron.overlap_vae_encode or os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1":
        return None
    return (
        "overlap_vae_encode: CUDA_DEVICE_MAX_CONNECTIONS is 1, so both streams share one hardware queue, and kernels of the decoder may "
        "wait for those of the autoencoder. Set it to 8 unless overlap of tensor-parallel traffic needs 1"
    )


def tokenizer_and_model(config: Config, arch: BagelArch) -> tuple[Tokenizer, BagelArch]:
    """Return the tokenizer, and the model with a vocabulary that holds every token."""
    tokenizer = load_tokenizer(tokenizer_path(config))
    grown_arch = grown_vocabulary(arch, len(tokenizer))
    validate_architecture(config, grown_arch)
    return tokenizer, grown_arch


def new_tokens(config: Config, tokenizer: Tokenizer, arch: BagelArch) -> dict[int, str]:
    """Return the tokens, by id, whose rows start from seeded values in a run that starts from trained weights.

    These are the special tokens that the tokenizer's files lack, and those beyond the ``arch`` of the starting weights. Image tokens are
    left out in a run without images.
    """
    if config.model.init_random and config.training.resume_from is None:
        return {}
    first = min(arch.llm.vocab_size, len(tokenizer) - tokenizer.num_added)
    has_images = config.training.visual_und or config.training.visual_gen
    unused = () if has_images else (tokenizer.start_of_image, tokenizer.end_of_image)
    return {row: tokenizer.decode([row]) for row in range(first, len(tokenizer)) if row not in unused}


def with_optional_components(run: ResolvedRun, config: Config) -> ResolvedRun:
    """Return the run with the settings of components that only some runs have."""
    return replace(
        run,
        local_checkpoints=local_checkpoint_settings(config),
        evaluation=evaluation_settings(config) if config.training.eval_every else None,
        wandb=wandb_settings(config) if run.sizes.use_wandb else None,
        trackers=tracker_settings(config),
        ema_warmup=config.training.ema_warmup,
    )


def record_of(config: Config) -> dict[str, Any]:
    """The configuration as a run keeps it: without ``--overwrite_run``, which is meant for one start and not for those from its record."""
    training = replace(config.training, overwrite_run=False)
    return replace(config, training=training, given=config.given - {"overwrite_run"}).to_record()


def start_settings(config: Config) -> StartSettings:
    """Return the settings of the run's starting point."""
    model, training = config.model, config.training
    llm, vit = (None, None) if model.init_random else (model.llm_path, model.vit_path if training.visual_und else None)
    return StartSettings(
        checkpoint_dir=Path(training.checkpoint_dir),
        auto_resume=training.auto_resume,
        resume_from=Path(training.resume_from) if training.resume_from is not None else None,
        model_only=training.resume_model_only,
        from_ema=training.finetune_from_ema,
        verify=training.verify_checkpoint,
        initial=InitialSettings(
            training.global_seed, llm, vit, model.allow_missing, training.copy_init_moe, training.check_weights, model.grow_vocabulary
        ),
        overwrite=training.overwrite_run,
        weights_name=training.weights_name,
        adapter_base=config.lora.lora_base,
    )


def build_settings(config: Config) -> BuildSettings:
    """Return the settings of building modules."""
    autoencoder_file = autoencoder_path(config) if config.data.latent_cache is None else None
    training = config.training
    return BuildSettings(
        config.megatron, freeze_settings(config), autoencoder_file, training.check_weights, training.vae_kernels, training.vae_batch_pixels
    )


def encoding_settings(config: Config, megatron: MegatronArguments) -> ImageEncoderSettings:
    """Return the settings of the image encoders; ``encoder_memory`` is decided in ``megatron``."""
    training = config.training
    chunk_tokens = megatron.encoder_chunk_tokens if megatron.encoder_memory == "constant" else None
    return ImageEncoderSettings(
        training.global_seed, training.vae_encode_padded, platform.device(), training.vae_encode_bf16, vit_chunk_tokens=chunk_tokens
    )


def optimizer_settings(config: Config, sizes: ResolvedSizes) -> OptimizerSettings:
    """Return the settings of AdamW and the sharding of its state."""
    training, megatron = config.training, config.megatron
    return OptimizerSettings(
        lr=training.lr,
        beta1=training.beta1,
        beta2=training.beta2,
        eps=training.eps,
        max_grad_norm=training.max_grad_norm,
        bf16=sizes.bf16,
        use_distributed_optimizer=sizes.use_distributed_optimizer,
        overlap_grad_reduce=megatron.overlap_grad_reduce,
        overlap_param_gather=megatron.overlap_param_gather,
        distributed_optimizer_instances=sizes.distributed_optimizer_instances,
        offload_fraction=megatron.optimizer_offload_fraction if megatron.optimizer_cpu_offload else 0.0,
        overlap_offload=megatron.overlap_cpu_optimizer_d2h_h2d,
        one_pass=megatron.one_pass_optimizer,
        state_dtype=megatron.optimizer_state_dtype,
    )


def schedule_settings(config: Config) -> ScheduleSettings:
    """Return the settings of the learning rate."""
    training = config.training
    return ScheduleSettings(
        training.lr, training.min_lr, training.warmup_steps, training.total_steps, training.lr_scheduler, training.zero_lr_first_step
    )


def step_settings(config: Config, sizes: ResolvedSizes) -> StepSettings:
    """Return the settings that all steps share."""
    training, megatron = config.training, config.megatron
    return StepSettings(
        LossWeights(training.ce_weight, training.mse_weight, training.ce_loss_reweighting),
        sizes.attention_backend,
        config.data.max_num_tokens,
        platform.device(),
        slot_multiple=megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1,
        fixed_slots=megatron.pipeline_model_parallel_size > 1,
        cp_comm_type=megatron.cp_comm_type,
        dropout_seed=training.global_seed if config.lora.lora_rank is not None and config.lora.lora_dropout else None,
    )


def step_log_settings(config: Config, sizes: ResolvedSizes) -> StepLogSettings:
    """Return the settings of log lines."""
    training = config.training
    return StepLogSettings(
        log_every=training.log_every,
        total_steps=training.total_steps,
        pack_tokens=config.data.max_num_tokens,
        replicas=sizes.data_parallel_size,
        frozen=freeze_settings(config),
    )


def saving_settings(config: Config) -> SavingSettings:
    """Return the settings of checkpoints and exports."""
    training = config.training
    return SavingSettings(
        checkpoint_dir=Path(training.checkpoint_dir),
        results_dir=Path(training.results_dir),
        every=training.save_every,
        export_every=training.export_hf_every,
        checkpoints=SaveSettings(training.async_save, training.keep_last, training.keep_every),
    )


def local_checkpoint_settings(config: Config) -> LocalCheckpointSettings | None:
    """Return the settings of checkpoints on the disks of the nodes, or None without them."""
    resilience = config.resilience
    if resilience.local_checkpoint_dir is None:
        return None
    return LocalCheckpointSettings(resilience.local_checkpoint_dir, resilience.save_local_every)


def resilience_settings(config: Config, command: str) -> ResilienceSettings:
    """Return the settings of what the run does when something goes wrong. The watchdog acts before collectives give up."""
    resilience, collective_minutes = config.resilience, config.megatron.distributed_timeout_minutes
    step_minutes = min(resilience.hang_timeout_minutes, 0.8 * collective_minutes)
    return ResilienceSettings(
        results_dir=Path(config.training.results_dir),
        limits=Limits(step_minutes * 60, resilience.first_step_timeout_minutes * 60),
        collective_minutes=collective_minutes,
        first_collective_minutes=max(collective_minutes, resilience.first_step_timeout_minutes),
        bad_steps=BadStepSettings(resilience.on_bad_step, resilience.loss_spike_factor, resilience.max_bad_steps),
        stragglers=StragglerSettings(resilience.straggler_every, resilience.straggler_factor),
        heartbeats=resilience.ft_heartbeats,
        grace_seconds=resilience.preemption_grace_seconds,
        command=command,
    )


def evaluation_settings(config: Config) -> EvaluationSettings:
    """Return the settings of evaluations."""
    training = config.training
    guidance = Guidance(training.eval_cfg_text_scale, training.eval_cfg_img_scale, (0.0, 1.0))
    return EvaluationSettings(
        samples=training.eval_samples,
        pictures=training.eval_pictures,
        answer_tokens=training.eval_answer_tokens,
        sampling=ImageSampling(training.eval_timesteps, training.timestep_shift, guidance),
        autoencoder=autoencoder_path(config),
    )


def wandb_settings(config: Config) -> WandbSettings:
    """Return the run's name and project on W&B."""
    training = config.training
    return WandbSettings(training.wandb_project, training.wandb_name, training.wandb_runid, training.wandb_resume, training.wandb_offline)


def tracker_settings(config: Config) -> TrackerSettings:
    """Return the settings of MLflow and trackio."""
    observing = config.observing
    return TrackerSettings(observing.mlflow_uri, observing.mlflow_experiment, observing.trackio_project)
