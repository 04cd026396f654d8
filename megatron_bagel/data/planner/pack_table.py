# SPDX-License-Identifier: Apache-2.0
"""Consecutive packs of the sequence as arrays: a rank that trains on one pack of thousands makes an object for that pack only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.planner.assign import PackPlan
from megatron_bagel.data.planner.block import Block, picks
from megatron_bagel.data.planner.cost_model import COST_UNIT


@dataclass(frozen=True)
class PackTable:
    """Packs ``first_pack``, ``first_pack + 1``, ... of the sequence.

    Attributes:
        first_pack: Number of the first pack.
        tokens: Tokens of every pack, int64 [packs].
        costs: Cost of every pack in decoder tokens, float64 [packs].
        bounds: Pack i has the samples ``picks[bounds[i]:bounds[i + 1]]``, int64 [packs + 1].
        picks: (source, index, epoch) of all samples, int64 [samples, 3].
    """

    first_pack: int
    tokens: np.ndarray
    costs: np.ndarray
    bounds: np.ndarray
    picks: np.ndarray

    @classmethod
    def of(cls, first_pack: int, slices: Sequence[tuple[Block, int, int]]) -> PackTable:
        """Join packs [begin, end) of consecutive blocks, given as (block, begin, end)."""
        sums = np.concatenate([np.empty((0, 2), dtype=np.int64), *(block.sums[begin:end] for block, begin, end in slices)])
        sizes = [np.diff(block.bounds[begin : end + 1]) for block, begin, end in slices]
        bounds = np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *sizes]))
        rows = [picks(block.rows[block.bounds[begin] : block.bounds[end]]) for block, begin, end in slices]
        return cls(first_pack, sums[:, 0], sums[:, 1] / COST_UNIT, bounds, np.concatenate([np.empty((0, 3), dtype=np.int64), *rows]))

    def __len__(self) -> int:
        return len(self.tokens)

    def plan(self, offset: int) -> PackPlan:
        """Return pack ``first_pack + offset``."""
        samples = self.picks[self.bounds[offset] : self.bounds[offset + 1]].tolist()
        return PackPlan(self.first_pack + offset, tuple(map(tuple, samples)), int(self.tokens[offset]), float(self.costs[offset]))

    def plans(self) -> list[PackPlan]:
        """Return all packs."""
        samples, bounds = list(map(tuple, self.picks.tolist())), self.bounds.tolist()
        columns = zip(bounds[:-1], bounds[1:], self.tokens.tolist(), self.costs.tolist(), strict=True)
        return [PackPlan(self.first_pack + n, tuple(samples[i:j]), tokens, cost) for n, (i, j, tokens, cost) in enumerate(columns)]
