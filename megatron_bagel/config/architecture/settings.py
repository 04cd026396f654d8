# SPDX-License-Identifier: Apache-2.0
"""Settings of a JSON file: those that a dataclass knows, those that it only carries along, and those that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def field_names(arch: type) -> set[str]:
    """Return the names of the settings that a dataclass reads; ``extra`` is no setting."""
    return {field.name for field in fields(arch)} - {"extra"}


def field_values(arch: Any) -> dict[str, Any]:
    """Return the settings of a dataclass and their values, without ``extra``."""
    return {field.name: getattr(arch, field.name) for field in fields(arch) if field.name != "extra"}


def split_settings(config: Mapping[str, Any], arch: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that ``arch`` reads and that have a value, and the settings that it does not know."""
    names = field_names(arch)
    known = {name: value for name, value in config.items() if name in names and value is not None}
    return known, {name: value for name, value in config.items() if name not in names}


def require_settings(config: Mapping[str, Any], names: tuple[str, ...], component: str) -> None:
    """Raise ValueError where a setting of ``names`` has no value. ``component`` says whose config it is."""
    missing_names = [name for name in names if config.get(name) is None]
    if missing_names:
        raise ValueError(f"{component} config lacks {', '.join(missing_names)}; it has {', '.join(sorted(config))}")
