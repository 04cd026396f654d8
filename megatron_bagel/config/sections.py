# SPDX-License-Identifier: Apache-2.0
"""The sections of training's flags, and the other names of flags, derived from the dataclasses."""

from __future__ import annotations

from dataclasses import Field, fields
from typing import Any

from megatron_bagel.config.arguments import DataArguments, ModelArguments, TrainingArguments
from megatron_bagel.config.flag import Flag
from megatron_bagel.config.lora_arguments import LoraArguments
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.observing_arguments import ObservingArguments
from megatron_bagel.config.resilience_arguments import ResilienceArguments

SECTIONS: dict[str, type] = {
    "model": ModelArguments, "data": DataArguments, "training": TrainingArguments, "megatron": MegatronArguments,
    "lora": LoraArguments, "observing": ObservingArguments, "resilience": ResilienceArguments,
}  # fmt: skip
#: Fields of all settings by name, in the order of the sections.
SETTINGS: dict[str, Field[Any]] = {setting.name: setting for arguments in SECTIONS.values() for setting in fields(arguments)}
#: Sections of all settings by name.
SECTION_OF: dict[str, str] = {setting.name: section for section, arguments in SECTIONS.items() for setting in fields(arguments)}
#: The original's names of settings by Megatron's names. Both are accepted.
ALIASES: dict[str, str] = {alias: name for name, setting in SETTINGS.items() for alias in Flag.of(setting).aliases}
