# SPDX-License-Identifier: Apache-2.0
"""Settings that are paths: how they are read, and how a run records them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_bagel.common.hub_names import pinned_hub_name
from megatron_bagel.common.paths import absolute_path, expanded_path

#: Names of the settings that hold a file or a folder.
PATHS = (
    "model_path", "llm_path", "vae_path", "vit_path", "tokenizer_path", "dataset_config_file", "data_root", "index_dir", "latent_cache",
    "index_cache_dir", "results_dir", "checkpoint_dir", "resume_from", "local_checkpoint_dir", "prometheus_file", "lora_base",
)  # fmt: skip
#: Those of them that also take a model on a hub, ``owner/name[@revision]``.
HUB_SETTINGS = ("model_path", "llm_path", "vae_path", "vit_path", "tokenizer_path", "resume_from", "lora_base")
#: Of the flags that commands have besides those of training, those that hold a file or a folder.
COMMAND_PATHS = ("model", "png")
#: Section of a record with the paths as they were typed, where the record's own are different.
TYPED = "typed"


def expand_paths(values: Mapping[str, Any], names: Collection[str] = PATHS) -> dict[str, Any]:
    """Return settings by name with ``~`` and ``$VAR`` of their paths replaced. Raises ValueError naming a flag that cannot be expanded."""
    return {name: expanded_path(value, f"--{name}") if name in names and value is not None else value for name, value in values.items()}


def with_absolute_paths(record: Mapping[str, Any], hub_names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a record of settings (sections of values) that means the same from any folder.

    Its paths are absolute. A section ``typed`` keeps those that were typed otherwise, and for folders of a hub's cache the model and its
    commit (``hub_names``, by setting).
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
            if value and hub_names and name in hub_names:
                absolute[section][name], typed[name] = absolute_path(value), hub_names[name]
            elif value and absolute_path(value) != value:
                absolute[section][name], typed[name] = absolute_path(value), value
    return {**absolute, TYPED: typed} if typed else absolute


def with_hub_names(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record in which models on a hub are named again where the folder of the cache that the run used is not here."""
    names = {name: text for name, text in (record.get(TYPED) or {}).items() if isinstance(text, str) and pinned_hub_name(text)}
    restored = {**record, **_gone(record, names)}
    for section, values in record.items():
        if section != TYPED and isinstance(values, Mapping):
            restored[section] = {**values, **_gone(values, names)}
    return restored


def _gone(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the settings whose folder is not here."""
    return {name: text for name, text in names.items() if isinstance(values.get(name), str) and not Path(values[name]).exists()}
