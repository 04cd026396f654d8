"""From a configuration to a resolved run: the one place where flags become settings of components.

It imports what it describes, Megatron-Core included, so the platform must be in place first.
"""

from __future__ import annotations

from pathlib import Path

from megatron_bagel import platform
from megatron_bagel.assembly.modules import BuildSettings
from megatron_bagel.assembly.starting_weights import InitialSettings, StartSettings
from megatron_bagel.checkpoint.dist.local_files import LocalCheckpointSettings
from megatron_bagel.checkpoint.dist.saver import SaveSettings
from megatron_bagel.checkpoint.hf.pretrained import grown_vocabulary
from megatron_bagel.cli.cost_settings import freeze_settings
from megatron_bagel.cli.data_settings import data_settings
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import ResolvedSizes, autoencoder_path, resolve, tokenizer_path
from megatron_bagel.config.validate import validate_architecture
from megatron_bagel.data.tokenizer import load_tokenizer
from megatron_bagel.encoders.image_encoding import ImageEncoderSettings
from megatron_bagel.inference.core.guidance import Guidance
from megatron_bagel.inference.core.image import ImageSampling
from megatron_bagel.training.evaluation.evaluator import EvaluationSettings
from megatron_bagel.training.loop import LoopSettings
from megatron_bagel.training.losses import LossWeights
from megatron_bagel.training.observability.logging_sinks import WandbSettings
from megatron_bagel.training.observability.step_log import StepLogSettings
from megatron_bagel.training.optim.lr_schedule import ScheduleSettings
from megatron_bagel.training.optim.optimizer import OptimizerSettings
from megatron_bagel.training.resilience.bad_steps import BadStepSettings
from megatron_bagel.training.resilience.hang_watchdog import Limits
from megatron_bagel.training.resilience.run_monitors import ResilienceSettings
from megatron_bagel.training.resilience.stragglers import StragglerSettings
from megatron_bagel.training.resolved_run import ResolvedRun
from megatron_bagel.training.saving import SavingSettings
from megatron_bagel.training.step import StepSettings


def resolve_run(config: Config, described: BagelArch, world_size: int, has_gpu: bool) -> ResolvedRun:
    """Settings of every component of the run.

    Args:
        config: what the flags and the file say; it has passed ``validate``.
        described: the model that ``validate`` read.
        world_size: ranks of the run.
        has_gpu: whether it runs on GPUs.

    Raises:
        ValueError: the tokenizer cannot be read, or the vocabulary that holds its tokens cannot be cut as the sizes ask for.
    """
    training, sizes = config.training, resolve(config, world_size, has_gpu)
    tokenizer = load_tokenizer(tokenizer_path(config))
    arch = grown_vocabulary(described, len(tokenizer))
    validate_architecture(config, arch)
    return ResolvedRun(
        record=config.to_record(),
        arch=arch,
        tokenizer=tokenizer,
        megatron=config.megatron,
        sizes=sizes,
        seed=training.global_seed,
        results_dir=Path(training.results_dir),
        data=data_settings(config),
        start=start_settings(config),
        build=build_settings(config),
        encoding=ImageEncoderSettings(training.global_seed, training.vae_encode_padded, platform.device(), training.vae_encode_bf16),
        optimizer=optimizer_settings(config, sizes),
        schedule=schedule_settings(config),
        ema_decay=training.ema,
        step=step_settings(config, sizes),
        loop=LoopSettings(training.total_steps, training.eval_every),
        step_log=step_log_settings(config, sizes),
        max_skipped_share=config.data.max_skipped_share,
        peak_device_tflops=training.peak_device_tflops,
        saving=saving_settings(config),
        resilience=resilience_settings(config),
        observing=config.observing,
        local_checkpoints=local_checkpoint_settings(config),
        evaluation=evaluation_settings(config) if training.eval_every else None,
        wandb=wandb_settings(config) if sizes.use_wandb else None,
    )


def start_settings(config: Config) -> StartSettings:
    """Where the run starts."""
    model, training = config.model, config.training
    llm, vit = (None, None) if model.init_random else (model.llm_path, model.vit_path if training.visual_und else None)
    return StartSettings(
        checkpoint_dir=Path(training.checkpoint_dir),
        auto_resume=training.auto_resume,
        resume_from=Path(training.resume_from) if training.resume_from is not None else None,
        model_only=training.resume_model_only,
        from_ema=training.finetune_from_ema,
        verify=training.verify_checkpoint,
        initial=InitialSettings(training.global_seed, llm, vit, model.allow_missing, training.copy_init_moe),
    )


def build_settings(config: Config) -> BuildSettings:
    """How its modules are built."""
    autoencoder = autoencoder_path(config) if config.data.latent_cache is None else None
    return BuildSettings(config.megatron, freeze_settings(config), autoencoder)


def optimizer_settings(config: Config, sizes: ResolvedSizes) -> OptimizerSettings:
    """AdamW, and where its state is."""
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
    )


def schedule_settings(config: Config) -> ScheduleSettings:
    """The learning rate of every step."""
    training = config.training
    return ScheduleSettings(
        training.lr, training.min_lr, training.warmup_steps, training.total_steps, training.lr_scheduler, training.zero_lr_first_step
    )


def step_settings(config: Config, sizes: ResolvedSizes) -> StepSettings:
    """What every step is told."""
    training, megatron = config.training, config.megatron
    return StepSettings(
        LossWeights(training.ce_weight, training.mse_weight, training.ce_loss_reweighting),
        sizes.attention_backend,
        config.data.max_num_tokens,
        platform.device(),
        slot_multiple=megatron.tensor_model_parallel_size if megatron.sequence_parallel else 1,
        fixed_slots=megatron.pipeline_model_parallel_size > 1,
        cp_comm_type=megatron.cp_comm_type,
    )


def step_log_settings(config: Config, sizes: ResolvedSizes) -> StepLogSettings:
    """Which steps are logged, and with which sizes."""
    training = config.training
    return StepLogSettings(
        log_every=training.log_every,
        total_steps=training.total_steps,
        pack_tokens=config.data.max_num_tokens,
        replicas=sizes.data_parallel_size,
        frozen=freeze_settings(config),
    )


def saving_settings(config: Config) -> SavingSettings:
    """When the run saves, and what it keeps."""
    training = config.training
    return SavingSettings(
        checkpoint_dir=Path(training.checkpoint_dir),
        results_dir=Path(training.results_dir),
        every=training.save_every,
        export_every=training.export_hf_every,
        checkpoints=SaveSettings(training.async_save, training.keep_last, training.keep_every),
    )


def local_checkpoint_settings(config: Config) -> LocalCheckpointSettings | None:
    """Checkpoints on the disks of the nodes, or None."""
    resilience = config.resilience
    if resilience.local_checkpoint_dir is None:
        return None
    return LocalCheckpointSettings(resilience.local_checkpoint_dir, resilience.save_local_every)


def resilience_settings(config: Config) -> ResilienceSettings:
    """What is done when something goes wrong. The watchdog speaks before the collectives give up."""
    resilience, collective = config.resilience, config.megatron.distributed_timeout_minutes
    step = min(resilience.hang_timeout_minutes, 0.8 * collective)
    return ResilienceSettings(
        results_dir=Path(config.training.results_dir),
        limits=Limits(step * 60, resilience.first_step_timeout_minutes * 60),
        collective_minutes=collective,
        first_collective_minutes=max(collective, resilience.first_step_timeout_minutes),
        bad_steps=BadStepSettings(resilience.on_bad_step, resilience.loss_spike_factor, resilience.max_bad_steps),
        stragglers=StragglerSettings(resilience.straggler_every, resilience.straggler_factor),
        heartbeats=resilience.ft_heartbeats,
        grace_seconds=resilience.preemption_grace_seconds,
    )


def evaluation_settings(config: Config) -> EvaluationSettings:
    """What an evaluation measures and shows."""
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
    """The run's name and project on W&B."""
    training = config.training
    return WandbSettings(training.wandb_project, training.wandb_name, training.wandb_runid, training.wandb_resume, training.wandb_offline)
