# SPDX-License-Identifier: Apache-2.0
"""Settings that are paths: how they are read, and how a run records them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bagel.common.paths import absolute_path, expanded_path

#: Names of the settings that hold a file or a folder.
PATHS = (
    "model_path", "llm_path", "vae_path", "vit_path", "tokenizer_path", "dataset_config_file", "data_root", "index_dir", "latent_cache",
    "results_dir", "checkpoint_dir", "resume_from", "local_checkpoint_dir", "prometheus_file", "lora_base",
)  # fmt: skip
#: Section of a record with the paths as they were typed, where the record's own are different.
TYPED = "typed"


def expand_paths(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by name with ``~`` and ``$VAR`` of their paths replaced. Raises ValueError naming a flag that cannot be expanded."""
    return {name: expanded_path(value, f"--{name}") if name in PATHS and value is not None else value for name, value in values.items()}


def with_absolute_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of settings (sections of values) that means the same from any folder.

    Its paths are absolute. A section ``typed`` keeps those that were typed otherwise.
    """
    absolute: dict[str, Any] = {}
    typed: dict[str, str] = {}
    for section, values in record.items():
        if not isinstance(values, Mapping):
            absolute[section] = values
            continue
        absolute[section] = dict(values)
        for name in PATHS:
            value = values.get(name)
            if value and absolute_path(value) != value:
                absolute[section][name], typed[name] = absolute_path(value), value
    return {**absolute, TYPED: typed} if typed else absolute
