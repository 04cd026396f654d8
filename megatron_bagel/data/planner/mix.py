# SPDX-License-Identifier: Apache-2.0
"""How often each source is drawn: a weight that may change over steps, and a number of epochs after which a source is used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Points = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class SourceRule:
    """The rule of one source.

    Attributes:
        weights: (step, weight) in ascending order; weights in between are interpolated, and the last one holds from its step on.
        max_epochs: Epochs after which no more samples are drawn; None sets no limit.
    """

    weights: Points
    max_epochs: int | None = None

    def weight_at(self, step: float) -> float:
        """Return the weight at a step."""
        steps, weights = zip(*self.weights, strict=True)
        return float(np.interp(step, steps, weights))

    def span_lengths(self) -> list[int]:
        """Return the steps between consecutive points of the schedule."""
        steps = [step for step, _ in self.weights]
        return [after - before for before, after in zip(steps[:-1], steps[1:], strict=True)]

    def is_used_up(self, position: int, size: int) -> bool:
        """Return whether a source of ``size`` samples has given all of them ``max_epochs`` times."""
        return self.max_epochs is not None and position >= self.max_epochs * size


def weights_now(rules: Sequence[SourceRule], step: float, positions: Sequence[int], sizes: Sequence[int]) -> list[float]:
    """Return the weight of every source; 0 for one that is used up."""
    return [
        0.0 if rule.is_used_up(position, size) else rule.weight_at(step)
        for rule, position, size in zip(rules, positions, sizes, strict=True)
    ]
