# SPDX-License-Identifier: Apache-2.0
"""Lists as parts of a sentence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def shorten(items: Sequence[object], most: int = 8, separator: str = ", ") -> str:
    """Join the first ``most`` items and count the rest: "a, b, ... and 3 more"; "nothing" for no items."""
    if not items:
        return "nothing"
    rest = len(items) - most
    shown = separator.join(map(str, items[:most]))
    return f"{shown}{separator}... and {rest} more" if rest > 0 else shown


def listed(items: Iterable[object], last: str = "or") -> str:
    """Join items for a sentence: "1", "1 or 2", "1, 2 or 4"."""
    words = [str(item) for item in items]
    return f"{', '.join(words[:-1])} {last} {words[-1]}" if len(words) > 1 else "".join(words)


def by_prefix(names: Iterable[str]) -> dict[str, int]:
    """Count dotted names by what stands before their first number: {"model.layers.*": 24, "connector.*": 4}."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        prefix = ".".join(parts[:number] if number is not None else parts[: max(1, len(parts) - 1)]) + (".*" if len(parts) > 1 else "")
        counts[prefix] = counts.get(prefix, 0) + 1
    return counts
