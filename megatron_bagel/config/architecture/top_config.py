# SPDX-License-Identifier: Apache-2.0
"""The ``config.json`` of a model folder, which is often broken, foreign or absent: it is a hint, and never stops a start.

The original never reads this file. Folders in use carry invalid JSON there, or the file of another model. What it would say follows
from ``llm_config.json``, ``vit_config.json`` and the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import read_json
from megatron_bagel.common.notices import notice

#: Settings of config.json that say which parts the model has.
PART_SWITCHES = ("visual_und", "visual_gen")


def read_top_config(folder: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``folder/config.json`` that can be used; one log line says what is wrong with the others.

    Args:
        folder: The model folder.
        defaults: The settings that are read, and a value of the type of each.
    """
    file = folder / "config.json"
    source = "llm_config.json, vit_config.json and the tensors describe the model"
    if not file.is_file():
        notice(f"{folder} has no config.json; {source}")
        return {}
    try:
        content = read_json(file, "model folder")
    except ValueError as error:
        notice(f"{error}; it is ignored: {source}")
        return {}
    expected = {**defaults, **dict.fromkeys(PART_SWITCHES, True)}
    stated = {name: content[name] for name in expected if content.get(name) is not None}
    if not stated:
        notice(f"{file} has no settings of BAGEL; it is ignored: {source}")
        return {}
    wrong_names = [name for name, value in stated.items() if not _is_usable(value, expected[name])]
    if wrong_names:
        values = ", ".join(f"{name} {stated[name]!r}" for name in wrong_names)
        notice(f"{file}: values that cannot be used are ignored ({values}); {source}")
    return {name: value for name, value in stated.items() if name not in wrong_names}


def _is_usable(value: Any, default: Any) -> bool:
    """Return whether ``value`` has the type of ``default``; numbers other than ``vit_select_layer``'s are positive."""
    if isinstance(default, bool) or isinstance(value, bool) or isinstance(default, str):
        return type(value) is type(default)
    if not isinstance(value, int | float if isinstance(default, float) else int):
        return False
    return value > 0 or default < 0
