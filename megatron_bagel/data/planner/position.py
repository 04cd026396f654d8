# SPDX-License-Identifier: Apache-2.0
"""A point in the sequence of packs, from which a planner can go on: what a checkpoint keeps of the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_bagel.data.planner.block import AGE, Block, picks


@dataclass(frozen=True)
class PlannerPosition:
    """The point behind the first ``packs`` packs, as arrays. That is cheap enough to note at every step and to send between processes.

    Attributes:
        packs: Packs before this point.
        counters: The stream's counters behind the block that is in use.
        waiting: (source, index, epoch, age) of the samples that wait behind this block, int64 [w, 4].
        planned: (source, index, epoch) of the samples of the block's remaining packs, int64 [n, 3].
        bounds: The bounds of these packs in ``planned``, int64.
    """

    packs: int
    counters: Mapping[str, Any]
    waiting: np.ndarray
    planned: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, packs: int, counters: Mapping[str, Any], block: Block, done_packs: int) -> PlannerPosition:
        """Note the point behind the first ``done_packs`` packs of ``block``."""
        bounds = block.bounds[done_packs:]
        waiting = np.column_stack([picks(block.waiting), block.waiting[:, AGE]])
        return cls(packs, counters, waiting, np.ascontiguousarray(picks(block.rows[bounds[0] :])), bounds - bounds[0])

    def state(self) -> dict[str, Any]:
        """Return the state that ``Planner.load_state_dict`` takes: only numbers, strings and lists."""
        planned, bounds = self.planned.tolist(), self.bounds.tolist()
        return {
            **self.counters,
            "packs": self.packs,
            "waiting": self.waiting[:, :3].tolist(),
            "ages": self.waiting[:, 3].tolist(),
            "planned": [planned[i:j] for i, j in zip(bounds[:-1], bounds[1:], strict=True)],
        }
