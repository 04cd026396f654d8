# SPDX-License-Identifier: Apache-2.0
"""The keys of the dataset YAML that say how often data come: ``weight``, ``dataset_weights`` and ``max_epochs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Points = tuple[tuple[int, float], ...]


def parse_weight(value: Any, label: str) -> Points:
    """Return the points (step, weight) of a weight: one number, or a mapping of steps to numbers that starts at step 0.

    Raises ValueError naming ``label``.
    """
    if not isinstance(value, Mapping):
        return ((0, _weight(value, label)),)
    if not value or any(isinstance(step, bool) or not isinstance(step, int) or step < 0 for step in value) or 0 not in value:
        raise ValueError(f"{label} must be a number, or map steps to numbers from step 0 on, such as {{0: 1, 10000: 0.2}}; got {value!r}")
    return tuple((step, _weight(value[step], label)) for step in sorted(value))


def _weight(value: Any, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{label} must be a number of at least 0, got {value!r}")
    return value


def parse_dataset_weights(value: Any, names: Sequence[str], label: str) -> tuple[Points, ...]:
    """Return the weights of the datasets of a group; none if they are shuffled together."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) != len(names):
        raise ValueError(f"{label}: dataset_weights needs one entry per dataset name ({len(names)}), got {value!r}")
    weights = tuple(parse_weight(weight, f"{label}: dataset_weights") for weight in value)
    if not any(weight > 0 for points in weights for _, weight in points):
        raise ValueError(f"{label}: dataset_weights are all 0, so no sample would ever be drawn")
    return weights


def parse_max_epochs(value: Any, names: Sequence[str], is_separate: bool, label: str) -> tuple[int | None, ...]:
    """Return the most epochs of each dataset, or of the group as a whole where its datasets are shuffled together."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value] * (len(names) if is_separate else 1)
    if len(values) != (len(names) if is_separate else 1):
        reason = "one entry per dataset name" if is_separate else "one number, or dataset_weights beside it for one per dataset"
        raise ValueError(f"{label}: max_epochs needs {reason}, got {value!r}")
    for number in values:
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise ValueError(f"{label}: max_epochs must be whole numbers of at least 1, got {value!r}")
    return tuple(values)


def product(first: Points, second: Points) -> Points:
    """Return the points of the product of two weights, taken at the steps of both."""
    steps = sorted({step for step, _ in (*first, *second)})
    return tuple((step, _at(first, step) * _at(second, step)) for step in steps)


def _at(points: Points, step: int) -> float:
    """Return a weight at a step: interpolated between points, constant after the last."""
    earlier = max(point for point in points if point[0] <= step)
    later = min((point for point in points if point[0] > step), default=None)
    if later is None or step == earlier[0]:
        return earlier[1]
    return earlier[1] + (later[1] - earlier[1]) * (step - earlier[0]) / (later[0] - earlier[0])


def shares(weights: Sequence[Points]) -> list[Points]:
    """Return the share of each weight in the sum of all, at the steps of any; 0 where all are 0."""
    steps = sorted({step for points in weights for step, _ in points})
    totals = {step: sum(_at(points, step) for points in weights) for step in steps}
    return [tuple((step, _at(points, step) / totals[step] if totals[step] else 0.0) for step in steps) for points in weights]
