# SPDX-License-Identifier: Apache-2.0
"""Rules between flags that hold for any model. The range of a single flag stands in its field."""

from __future__ import annotations

from megatron_bagel.config.lora_rules import check_lora
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parser import Config


def check_consistency(config: Config) -> None:
    """Check settings of data, losses, memory and start that only make sense together."""
    data, training, megatron = config.data, config.training, config.megatron
    if data.max_num_tokens_per_sample > data.max_num_tokens and "max_num_tokens_per_sample" in config.given:
        raise ValueError(
            f"--max_num_tokens_per_sample {data.max_num_tokens_per_sample} is more than a pack holds "
            f"(--max_num_tokens {data.max_num_tokens}); lower it, or raise --max_num_tokens"
        )
    if training.expected_num_tokens > data.max_num_tokens and "expected_num_tokens" in config.given:
        raise ValueError(
            f"--expected_num_tokens {training.expected_num_tokens} is more than a pack holds (--max_num_tokens {data.max_num_tokens})"
        )
    if training.lr_scheduler == "cosine" and training.min_lr > training.lr:
        raise ValueError(f"--min_lr {training.min_lr} is above --lr {training.lr}")
    if training.lr_scheduler == "cosine" and training.warmup_steps >= training.total_steps:
        raise ValueError(
            f"--warmup_steps {training.warmup_steps} leaves no step of --total_steps {training.total_steps} for --lr_scheduler cosine to "
            "decay over; lower --warmup_steps, or raise --total_steps"
        )
    if megatron.overlap_param_gather and not (megatron.use_distributed_optimizer and megatron.overlap_grad_reduce):
        raise ValueError("--overlap_param_gather needs --use_distributed_optimizer and --overlap_grad_reduce")
    _check_one_pass(config)
    _check_overlap_vae_encode(config)
    if (megatron.fake_world_size is not None or "fake_rank" in config.given) and not megatron.dry_run:
        raise ValueError("--fake_world_size and --fake_rank describe a dry run: add --dry_run, or drop them")
    if megatron.manual_gc_interval and not megatron.manual_gc:
        raise ValueError(f"--manual_gc_interval {megatron.manual_gc_interval} needs --manual_gc: without it each rank collects by itself")
    check_recompute(config)
    check_parallel_consistency(megatron)
    check_lora(config)
    if training.keep_every and not training.keep_last:
        raise ValueError(f"--keep_every {training.keep_every} needs --keep_last: without it no checkpoint is removed")
    if training.eval_every and not data.split:
        raise ValueError(f'--eval_every {training.eval_every} needs rows that are not trained on: give --split, such as "99,1"')
    if training.eval_at_start and not training.eval_every:
        raise ValueError("--eval_at_start True needs --eval_every: the steps between the evaluations after it")
    if training.overwrite_run and training.auto_resume:
        raise ValueError("--overwrite_run moves an earlier run aside and --auto_resume True continues it; give one of them")
    if training.resume_model_only and training.resume_from is None:
        raise ValueError("--resume_model_only True needs --resume_from: the checkpoint or folder to take weights from")
    if training.weights_name is not None and not training.resume_model_only:
        raise ValueError(
            f"--weights_name {training.weights_name} names a weight file of the model folder --resume_from; it needs "
            "--resume_model_only True"
        )
    if training.finetune_from_ema and not training.resume_model_only:
        raise ValueError("--finetune_from_ema True needs --resume_model_only True: a full resume has both model and EMA")
    if training.finetune_from_hf and training.resume_from is None and not config.model.init_random:
        raise ValueError(
            "--finetune_from_hf True only gives architecture, tokenizer and autoencoder; weights come from --resume_from "
            f"(usually the same folder: --resume_from {config.model.model_path} --resume_model_only True). "
            "To train from random weights on purpose, add --init_random True"
        )


def check_resilience(config: Config) -> None:
    """Check the watchdog's limits against those of the collectives, and flags of checkpoints and restarts that need each other."""
    resilience, collective_minutes = config.resilience, config.megatron.distributed_timeout_minutes
    if resilience.hang_timeout_minutes >= collective_minutes and "hang_timeout_minutes" in config.given:
        raise ValueError(
            f"--hang_timeout_minutes {resilience.hang_timeout_minutes} must be below --distributed_timeout_minutes {collective_minutes}: "
            "otherwise the collectives give up first, and nothing names the rank that they waited for"
        )
    if resilience.first_step_timeout_minutes < resilience.hang_timeout_minutes:
        raise ValueError(
            f"--first_step_timeout_minutes {resilience.first_step_timeout_minutes} is below --hang_timeout_minutes "
            f"{resilience.hang_timeout_minutes}; the first step takes longer than the others"
        )
    if 0 < resilience.loss_spike_factor <= 1:
        raise ValueError(f"--loss_spike_factor {resilience.loss_spike_factor} would call every step a spike; it must be above 1, or 0")
    if (resilience.local_checkpoint_dir is None) != (resilience.save_local_every == 0):
        raise ValueError(
            "--local_checkpoint_dir and --save_local_every need each other: a folder on a disk of each node, and the steps between saves"
        )
    if resilience.inprocess_restarts and not config.training.auto_resume:
        raise ValueError("--inprocess_restarts needs --auto_resume True: a run that starts again continues from its newest checkpoint")


def check_recompute(config: Config) -> None:
    """Check that flags of recomputation match its granularity."""
    megatron = config.megatron
    if megatron.recompute_granularity != "full" and config.given & {"recompute_method", "recompute_num_layers"}:
        raise ValueError("--recompute_method and --recompute_num_layers need --recompute_granularity full")
    if megatron.recompute_modules and megatron.recompute_granularity != "selective":
        raise ValueError("--recompute_modules needs --recompute_granularity selective")


def check_parallel_consistency(megatron: MegatronArguments) -> None:
    """Check parallel settings that need each other."""
    if megatron.sequence_parallel and megatron.tensor_model_parallel_size == 1:
        raise ValueError("--sequence_parallel splits tokens over tensor-parallel ranks: it needs --tensor_model_parallel_size above 1")
    for name in ("virtual_pipeline_model_parallel_size", "num_layers_per_virtual_pipeline_stage", "num_layers_in_first_pipeline_stage",
                 "num_layers_in_last_pipeline_stage"):  # fmt: skip
        size = getattr(megatron, name)
        if size is not None and megatron.pipeline_model_parallel_size == 1:
            raise ValueError(f"--{name} {size} needs --pipeline_model_parallel_size above 1")
    if megatron.num_layers_per_virtual_pipeline_stage is not None and (
        megatron.num_layers_in_first_pipeline_stage is not None or megatron.num_layers_in_last_pipeline_stage is not None
    ):
        raise ValueError(
            "--num_layers_per_virtual_pipeline_stage needs equal stages; with --num_layers_in_first_pipeline_stage or "
            "--num_layers_in_last_pipeline_stage say --virtual_pipeline_model_parallel_size instead"
        )


def check_observing(config: Config, world_size: int) -> None:
    """Check the profiler's window and ranks, and the name of the file for Prometheus."""
    observing = config.observing
    profile_flags = sorted(config.given & {"profile_step_start", "profile_step_end", "profile_ranks", "profile_shapes"})
    if profile_flags and not observing.profile:
        raise ValueError(f"--{profile_flags[0]} needs --profile: nothing is profiled without it")
    if observing.profile and not 0 <= observing.profile_step_start < observing.profile_step_end:
        raise ValueError(
            f"--profile_step_start {observing.profile_step_start} and --profile_step_end {observing.profile_step_end} leave no step to "
            "profile: the first must be 0 or more, and below the second"
        )
    unknown_ranks = [rank for rank in observing.profile_ranks if not 0 <= rank < world_size]
    if observing.profile and (unknown_ranks or not observing.profile_ranks):
        raise ValueError(f"--profile_ranks {' '.join(map(str, unknown_ranks))}: give ranks of this run, 0 to {world_size - 1}")
    if observing.prometheus_file is not None and not observing.prometheus_file.endswith(".prom"):
        raise ValueError(f"--prometheus_file {observing.prometheus_file}: node_exporter only reads files whose names end in .prom")


def _check_overlap_vae_encode(config: Config) -> None:
    """Refuse to encode ahead where no autoencoder encodes. Raises ValueError."""
    if not config.megatron.overlap_vae_encode:
        return
    if not config.training.visual_gen:
        raise ValueError("--overlap_vae_encode True has nothing to encode: --visual_gen False has no autoencoder. Leave one of them out")
    if config.data.latent_cache is not None:
        raise ValueError("--overlap_vae_encode True has nothing to encode: --latent_cache holds the latents. Leave one of them out")


def _check_one_pass(config: Config) -> None:
    """Refuse what the optimizer in one pass cannot do. Raises ValueError."""
    megatron, beta2 = config.megatron, config.training.beta2
    if megatron.one_pass_optimizer and not megatron.use_distributed_optimizer:
        raise ValueError("--one_pass_optimizer needs --use_distributed_optimizer, whose slices of weights it goes through")
    if megatron.one_pass_optimizer and megatron.optimizer_cpu_offload:
        raise ValueError("--one_pass_optimizer does not work with --optimizer_cpu_offload, which has an update of its own in host memory")
    if megatron.optimizer_state_dtype == "fp32":
        return
    if not megatron.one_pass_optimizer:
        raise ValueError(f"--optimizer_state_dtype {megatron.optimizer_state_dtype} needs --one_pass_optimizer True")
    if beta2 > 0.99:
        raise ValueError(
            f"--optimizer_state_dtype bf16 with --beta2 {beta2}: a step changes the squared average by {1 - beta2:.1%}, and bf16 rounds "
            "changes below 0.4 % away. Use fp32 moments, or --beta2 0.99 or less"
        )
