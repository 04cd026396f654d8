# SPDX-License-Identifier: Apache-2.0
"""The record of a run's configuration, as ``Config.to_dict`` returns it, written for people and for ``--config``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_bagel.common.files import write_whole


def write_record(record: Mapping[str, Any], path: str | Path) -> None:
    """Write a record as YAML that ``--config`` accepts, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, yaml.safe_dump(dict(record), sort_keys=False))
