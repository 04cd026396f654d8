# SPDX-License-Identifier: Apache-2.0
"""The resolved run as YAML that ``--config`` takes: given values, defaults, and the values that the run derives from both."""

from __future__ import annotations

from typing import Any

import yaml

from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import ResolvedSizes, own_index, resolve, tokenizer_path
from megatron_bagel.config.sections import SECTION_OF
from megatron_bagel.config.validate import validate_settings


def resolved_yaml(config: Config, world_size: int, has_gpu: bool) -> str:
    """Return sections with the values that a run on ``world_size`` ranks uses, the given names, and the derived values.

    ``--config`` takes given values as given and derives the others again. So the file also describes a run of another size.

    Raises:
        ValueError: for settings that cannot work. Files and folders are not checked.
    """
    validate_settings(config, world_size, has_gpu)
    derived = derived_values(config, resolve(config, world_size, has_gpu))
    content = config.to_dict()
    for name, value in derived.items():
        content[SECTION_OF[name]][name] = value
    return yaml.safe_dump({**content, "derived": derived}, sort_keys=False)


def derived_values(config: Config, run: ResolvedSizes) -> dict[str, Any]:
    """Return the settings that were not given and whose value in this run is not their default."""
    ranks_per_copy = run.data_parallel_size // run.distributed_optimizer_instances
    values: dict[str, Any] = {
        "tokenizer_path": tokenizer_path(config),
        "index_dir": str(own_index(config)),
        "use_wandb": run.use_wandb,
        "gradient_accumulation_steps": run.num_microbatches,
        "use_distributed_optimizer": run.use_distributed_optimizer,
        "num_distributed_optimizer_instances": run.distributed_optimizer_instances,
        "num_replicate": run.distributed_optimizer_instances,
        "num_shard": ranks_per_copy if run.use_distributed_optimizer else config.training.num_shard,
        "global_batch_size": run.global_batch_size,
        "bf16": run.bf16,
        "attention_backend": run.attention_backend,
        "use_flex": run.attention_backend == "flex",
    }
    return {name: value for name, value in values.items() if name not in config.given and value != config.value_of(name)}
