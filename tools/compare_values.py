# SPDX-License-Identifier: Apache-2.0
"""Decides when two values count as equal, and tallies a comparison: how many differ, where first, and by how much at most."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_bagel.common.wording import shorten

MAX_NAMES = 3


@dataclass(frozen=True)
class Rule:
    """Accepts equal bits only, or floating-point numbers within a relative ``tolerance``. Integers and texts must always be equal."""

    bitwise: bool = False
    tolerance: float = 1e-5

    def accepts(self, left: Any, right: Any, relative: float) -> bool:
        """Return whether two plain values, ``relative`` apart, count as equal."""
        if self.bitwise:
            # repr keeps every bit of a float, the sign of a zero included.
            return type(left) is type(right) and repr(left) == repr(right)
        if isinstance(left, float) or isinstance(right, float):
            return relative <= self.tolerance
        return left == right

    def __str__(self) -> str:
        return "to the last bit" if self.bitwise else f"within {self.tolerance:g} relative"


def relative_difference(left: Any, right: Any) -> float:
    """Return |left - right| over the larger magnitude, or infinity for values that cannot be subtracted."""
    if left == right or (_is_nan(left) and _is_nan(right)):
        return 0.0
    if not (_is_number(left) and _is_number(right)) or not (math.isfinite(left) and math.isfinite(right)):
        return math.inf
    return abs(left - right) / max(abs(left), abs(right))


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, plain value) of everything inside nested dictionaries and lists. An empty one is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)) and value:
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path, value


@dataclass
class Tally:
    """Counts what was compared in one part, and what differed.

    Attributes:
        name: The part's name.
        unit: What is counted, in the plural.
        compared: How many things exist on both sides.
        different: How many of them the rule does not accept.
        first: The first of those, described.
        largest: The largest relative difference, accepted ones included.
        largest_where: Where it is.
        only: Descriptions of what exists on one side, by side ("A", "B").
    """

    name: str
    unit: str
    compared: int = 0
    different: int = 0
    first: str = ""
    largest: float = 0.0
    largest_where: str = ""
    only: dict[str, list[str]] = field(default_factory=lambda: {"A": [], "B": []})

    @property
    def equal(self) -> bool:
        """Return whether nothing differs and nothing is on one side only."""
        return not self.different and not any(self.only.values())

    def add(self, where: str, description: str, relative: float, accepted: bool) -> None:
        """Count one thing that exists on both sides."""
        self.compared += 1
        if not accepted:
            self.different += 1
            self.first = self.first or f"{where}: {description}"
        if relative > self.largest:
            self.largest, self.largest_where = relative, where

    def note_one_sided(self, left: Collection[str], right: Collection[str]) -> None:
        """Note the names that only one side has."""
        self.only["A"] += [name for name in left if name not in right]
        self.only["B"] += [name for name in right if name not in left]

    def compare(self, left: Mapping[str, Any], right: Mapping[str, Any], rule: Rule) -> None:
        """Count plain values by name, in the order of ``left``."""
        self.note_one_sided(left, right)
        for name in left:
            if name in right:
                relative = relative_difference(left[name], right[name])
                accepted = rule.accepts(left[name], right[name], relative)
                self.add(name, f"{left[name]!r} and {right[name]!r}, {relative:.3g} relative", relative, accepted)

    def sentence(self, rule: Rule) -> str:
        """Return the result in one sentence."""
        largest = f"largest difference {self.largest:.3g} relative at {self.largest_where}" if self.largest else ""
        if self.equal:
            return f"{self.name}: {self.compared} {self.unit} are equal {rule}" + (f", {largest}" if largest else "")
        clauses = []
        if self.different:
            clauses.append(f"{self.different} of {self.compared} {self.unit} differ, first {self.first}")
            clauses.append(largest or "the values are equal")
        clauses += [f"only in {side}: {shorten(names, MAX_NAMES)}" for side, names in self.only.items() if names]
        return f"{self.name}: {'; '.join(clauses)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
