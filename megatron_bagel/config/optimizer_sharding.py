# SPDX-License-Identifier: Apache-2.0
"""The sharding of optimizer state, from FSDP's and Megatron's flags for the same choice."""

from __future__ import annotations

from megatron_bagel.common.wording import listed
from megatron_bagel.config.original_flags import SHARDING_STRATEGIES
from megatron_bagel.config.parallel_sizes import divisors
from megatron_bagel.config.parser import Config


def optimizer_sharding(config: Config, data_parallel: int) -> tuple[bool, int]:
    """Return whether the optimizer is distributed, and the number of its instances.

    Args:
        config: Settings of the run, with FSDP's and Megatron's names for the same choice.
        data_parallel: Number of data-parallel ranks.

    Raises:
        ValueError: if flags contradict each other or do not fit the number of ranks.
    """
    training, megatron, given = config.training, config.megatron, config.given
    strategy = training.sharding_strategy
    if strategy not in SHARDING_STRATEGIES:
        raise ValueError(f"--sharding_strategy {strategy!r} is none of {', '.join(SHARDING_STRATEGIES)}")
    distributed = megatron.use_distributed_optimizer
    if strategy == "NO_SHARD":
        if "use_distributed_optimizer" in given and distributed:
            raise ValueError("--sharding_strategy NO_SHARD and --use_distributed_optimizer contradict each other; give one of them")
        distributed = False
    if not distributed and megatron.overlap_param_gather:
        raise ValueError("--overlap_param_gather gathers sharded weights: it needs --use_distributed_optimizer, not NO_SHARD")
    instances = _instances(config, is_hybrid="HYBRID" in strategy)
    if instances < 1 or data_parallel % instances:
        raise ValueError(
            f"{instances} optimizer instances (--num_distributed_optimizer_instances, --num_replicate) do not divide the "
            f"{data_parallel} data-parallel ranks; {listed(divisors(data_parallel))} would"
        )
    if instances > 1 and not distributed:
        raise ValueError("more than one optimizer instance (--num_replicate) needs --use_distributed_optimizer True")
    if "num_shard" in given and "HYBRID" in strategy and distributed and training.num_shard * instances != data_parallel:
        raise ValueError(
            f"--num_shard {training.num_shard} x --num_replicate {instances} = {training.num_shard * instances}, but there are "
            f"{data_parallel} data-parallel ranks; give --num_shard {data_parallel // instances}, or leave the flag out"
        )
    return distributed, instances


def _instances(config: Config, is_hybrid: bool) -> int:
    replicas, instances = config.training.num_replicate, config.megatron.num_distributed_optimizer_instances
    if replicas > 1 and not is_hybrid:
        raise ValueError(f"--num_replicate {replicas} only means something with --sharding_strategy HYBRID_SHARD")
    if instances is None:
        return replicas
    if "num_replicate" in config.given and instances != replicas:
        raise ValueError(f"--num_distributed_optimizer_instances {instances} and --num_replicate {replicas} are one setting; give one")
    return instances
