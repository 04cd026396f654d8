# SPDX-License-Identifier: Apache-2.0
"""What a source row may be: the limits and permissions that a build gives by flag and that decide which rows are kept out."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.common.json_text import MAX_JSON_DEPTH

MAX_TEXT_BYTES = 1 << 22  # a tokenizer takes about 200 bytes of memory and some microseconds for each


@dataclass(frozen=True)
class RowRules:
    """Limits of a row.

    Attributes:
        max_text_bytes: The most bytes of a line of JSON, and of the texts of a parquet row.
        max_json_depth: The most levels of nesting of JSON.
        allow_outside_root: Whether names of images and videos may leave their folder, by ``..``, as an absolute path or as a URL.
    """

    max_text_bytes: int = MAX_TEXT_BYTES
    max_json_depth: int = MAX_JSON_DEPTH
    allow_outside_root: bool = False

    def __post_init__(self) -> None:
        for name in ("max_text_bytes", "max_json_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, got {getattr(self, name)}")


DEFAULT_RULES = RowRules()
