# SPDX-License-Identifier: Apache-2.0
"""The only reader of YAML files. Every error names the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_bagel.common.files import read_text


def read_yaml(path: Path, what: str) -> Any:
    """Return the value in a YAML file, None for an empty one. Only plain values are read, never objects.

    Args:
        path: The file.
        what: The flag or thing the file belongs to; error messages begin with it.

    Raises:
        ValueError: The file is absent, unreadable, a Git LFS pointer, or no YAML.
    """
    text = read_text(path, what)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that cannot be
        raise ValueError(f"{what}: {path} is not valid YAML ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{what}: {path} is not valid YAML for this program: it is nested too deeply") from error
