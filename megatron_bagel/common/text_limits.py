# SPDX-License-Identifier: Apache-2.0
"""How long a text from outside may be, and how deep JSON may be nested: one pair of flags for rows of data, prompts and questions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.common.json_text import MAX_JSON_DEPTH

MAX_TEXT_BYTES = 1 << 22  # a tokenizer takes about 200 bytes of memory and some microseconds for each


@dataclass(frozen=True)
class TextLimits:
    """Limits of what one row, prompt or question may be.

    Attributes:
        max_text_bytes: The most bytes of a line of JSON, and of the texts of a parquet row or a prompt.
        max_json_depth: The most levels of nesting of JSON.
    """

    max_text_bytes: int = MAX_TEXT_BYTES
    max_json_depth: int = MAX_JSON_DEPTH

    def __post_init__(self) -> None:
        for name in ("max_text_bytes", "max_json_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be 1 or more, got {getattr(self, name)}")

    def too_long(self, size: int) -> str | None:
        """Return what is wrong with ``size`` bytes, to follow a subject such as "the line has"; None if they are within the limit."""
        return f"{size} bytes, above the limit of {self.max_text_bytes} (--max_text_bytes)" if size > self.max_text_bytes else None


DEFAULT_LIMITS = TextLimits()
