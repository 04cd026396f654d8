# SPDX-License-Identifier: Apache-2.0
"""The rules of ``--optimizer_cpu_offload``: what Megatron-Core's hybrid optimizer needs, and what does not work beside it."""

from __future__ import annotations

from importlib.util import find_spec

from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parser import Config

_FLAGS = ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d")


def check_optimizer_offload(config: Config, has_gpu: bool) -> None:
    """Check that an offloaded optimizer can work. Raises ValueError with the flag, the reason and what to do."""
    megatron = config.megatron
    if not megatron.optimizer_cpu_offload:
        given = [name for name in _FLAGS if name in config.given]
        if given:
            raise ValueError(f"--{given[0]} needs --optimizer_cpu_offload: without it nothing of the optimizer is in host memory")
        return
    if not has_gpu:
        raise ValueError(
            "--optimizer_cpu_offload moves optimizer state from a GPU to host memory; on CPU it is there already, and Megatron-Core's "
            "hybrid optimizer needs CUDA streams and pinned memory. Leave it out here; `megatron-bagel plan` shows what it saves on GPUs"
        )
    if megatron.dry_run:
        raise ValueError("--optimizer_cpu_offload has no dry run, which builds nothing in host memory; take `megatron-bagel plan`")
    if megatron.bf16 is False:
        raise ValueError("--optimizer_cpu_offload needs --bf16: the fp32 weights that it keeps in host memory are copies of bf16 ones")
    if not megatron.use_distributed_optimizer or config.training.sharding_strategy == "NO_SHARD":
        raise ValueError(
            "--optimizer_cpu_offload needs --use_distributed_optimizer, the only one that Megatron-Core's hybrid optimizer serves"
        )
    if config.resilience.local_checkpoint_dir is not None:
        raise ValueError(
            "--optimizer_cpu_offload does not work with --local_checkpoint_dir: Megatron-Core loads the optimizer's buffers of such a "
            "checkpoint without handing them to the optimizer in host memory. Use --save_every and --async_save"
        )


def check_offload_package(megatron: MegatronArguments) -> None:
    """Check that a run, unlike a plan, has the package whose version Megatron-Core asks for. Raises ValueError without it."""
    if megatron.optimizer_cpu_offload and find_spec("transformer_engine") is None:
        raise ValueError(
            "--optimizer_cpu_offload needs the package transformer-engine: Megatron-Core compares its version for the hybrid optimizer"
        )
