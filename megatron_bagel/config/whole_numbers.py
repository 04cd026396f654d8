# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model must be whole numbers of at least 1, before anything divides by them."""

from __future__ import annotations

from collections.abc import Iterable


def require_sizes(config: object, names: Iterable[str], what: str) -> None:
    """Raise ValueError naming the first attribute of ``config`` that is no whole number of at least 1. ``what`` begins the message."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{what} config has {name} {value!r}; it must be a whole number of at least 1")
