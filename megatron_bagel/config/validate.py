# SPDX-License-Identifier: Apache-2.0
"""The checks before ranks exchange anything. They need no data, and each error names the flag, the reason and what to do."""

from __future__ import annotations

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.flag import check_values
from megatron_bagel.config.flag_rules import check_consistency, check_observing, check_resilience
from megatron_bagel.config.fp8 import check_fp8_settings, check_fp8_sizes
from megatron_bagel.config.lora import check_adapted_parts, lora_settings
from megatron_bagel.config.magi_rules import check_magi_settings, check_magi_sizes
from megatron_bagel.config.moe_rules import check_expert_flags, check_expert_sizes
from megatron_bagel.config.offload_rules import check_optimizer_offload
from megatron_bagel.config.parallel_sizes import check_parallel_sizes
from megatron_bagel.config.parser import Config
from megatron_bagel.config.required_paths import check_paths
from megatron_bagel.config.resolve import architecture, resolve
from megatron_bagel.config.sections import SECTIONS


def validate(config: Config, world_size: int, has_gpu: bool) -> BagelArch:
    """Check all settings, and return the model that they describe. This reads the model's JSON, once per start.

    Args:
        config: Settings of the run.
        world_size: Number of ranks.
        has_gpu: Whether the run uses GPUs.

    Raises:
        ValueError: for the first setting that cannot work, before this process has met another one.
    """
    validate_settings(config, world_size, has_gpu)
    check_paths(config)
    arch = architecture(config)
    validate_architecture(config, arch)
    return arch


def validate_settings(config: Config, world_size: int, has_gpu: bool) -> None:
    """Check the settings without reading a file. Raises ValueError for the first one that cannot work."""
    refuse_unsupported_values(config)
    check_numbers(config)
    check_resilience(config)
    check_consistency(config)
    check_observing(config, world_size)
    check_fp8_settings(config.megatron, has_gpu)
    check_optimizer_offload(config, has_gpu)
    check_magi_settings(config.megatron, has_gpu)
    resolve(config, world_size, has_gpu)


def refuse_unsupported_values(config: Config) -> None:
    """Refuse values of the original's flags that cannot be honoured here. docs/flags.md has the reasons too."""
    training = config.training
    if training.backward_prefetch != "BACKWARD_PRE":
        raise ValueError(
            f"--backward_prefetch {training.backward_prefetch} is not supported: weights are whole on every rank, so there is nothing to "
            "prefetch. Overlap of communication is set by --overlap_grad_reduce and --overlap_param_gather"
        )
    if training.cpu_offload:
        raise ValueError(
            "--cpu_offload True is not supported: FSDP's offload of weights has no counterpart here. --optimizer_cpu_offload moves "
            "optimizer state and fp32 weights to host memory, and --use_distributed_optimizer shards them over ranks"
        )
    if not training.freeze_vae:
        raise ValueError("--freeze_vae False is not supported: the autoencoder is never trained, and is not in the original either")
    if config.megatron.micro_batch_size != 1:
        raise ValueError(f"--micro_batch_size is {config.megatron.micro_batch_size}; a microbatch is one pack: raise --max_num_tokens")


def check_numbers(config: Config) -> None:
    """Check every setting by itself, against the range and the choices in its field."""
    for section in SECTIONS:
        check_values(getattr(config, section))


def validate_architecture(config: Config, arch: BagelArch) -> None:
    """Check parallel sizes, recomputation and loss weights against the model."""
    megatron, llm = config.megatron, arch.llm
    check_parallel_sizes(megatron, llm)
    check_expert_flags(config.given, llm)
    check_expert_sizes(megatron, llm)
    lora = lora_settings(config.lora)
    if lora is not None:
        check_adapted_parts(lora, arch)
    check_fp8_sizes(megatron, llm)
    check_magi_sizes(megatron, llm)
    if arch.vit is None and arch.autoencoder is None and not config.training.ce_weight:
        raise ValueError("--visual_gen False, --visual_und False and --ce_weight 0 leave nothing to train on")
    if megatron.recompute_granularity == "full" and megatron.recompute_num_layers > llm.num_hidden_layers:
        raise ValueError(f"--recompute_num_layers {megatron.recompute_num_layers} is more than the decoder's {llm.num_hidden_layers}")
