# SPDX-License-Identifier: Apache-2.0
"""Synthetic sample lengths, and the original's greedy packing of them: what the planner is held against.

The greedy packing is that of the original's data loader (behaviour known from its runs): every rank for itself, samples in stream
order, an overflow buffer that is tried first below ``prefer_buffer_before``, a pack given out at ``expected_num_tokens`` or when
the buffer is full (the sample at hand is then lost).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.keyed_random import keyed_integers, keyed_uniform
from megatron_bagel.data.planner.cost_model import COST_UNIT, CostModel, Measures

CAPACITY, EXPECTED, PREFER_BUFFER, BUFFER = 36864, 32768, 16384, 50


@dataclass
class Lengths:
    """A source of lengths alone: ``lognormal`` (median 665 tokens) or ``images`` (1024 to 4096 latent tokens and a caption)."""

    mix: str
    size: int = 10_000_000
    name: str = "lengths"
    weight: float = 1.0
    is_mandatory: bool = False
    keep_position: bool = True

    def __len__(self) -> int:
        return self.size

    def measure(self, indexes: np.ndarray, epoch: int) -> Measures:
        """Lengths keyed by index and epoch; cost by the default cost model, one document of full attention each."""
        u, v = (keyed_uniform(0, what, indexes, epoch) for what in ("u", "v"))
        if self.mix == "lognormal":
            normal = np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)
            tokens = np.exp(6.5 + normal).clip(20, 16384).astype(np.int64)
        else:
            rows, columns = (32 + keyed_integers(33, 0, side, indexes, epoch) for side in ("rows", "columns"))
            tokens = rows * columns + 4 + (10 + 90 * u).astype(np.int64)
        cost = (tokens + CostModel().pair * tokens.astype(np.float64) ** 2) * COST_UNIT
        return Measures(tokens, tokens, cost.astype(np.int64))

    def describe(self, index: int) -> str:
        """Not from a file."""
        return f"length {index}"


def greedy_packs(source: Lengths, rank: int, ranks: int, count: int) -> list[tuple[int, float]]:
    """(tokens, cost) of ``count`` packs of one rank by the original's algorithm."""
    packs: list[tuple[int, float]] = []
    buffer: deque[tuple[int, float]] = deque()
    drawn, tokens, cost = 0, 0, 0.0
    while len(packs) < count:
        from_buffer = tokens < PREFER_BUFFER and bool(buffer)
        if from_buffer:
            length, work = buffer.popleft()
        else:
            measures = source.measure(np.array([rank + drawn * ranks]), 0)
            length, work, drawn = int(measures.tokens[0]), float(measures.cost[0]) / COST_UNIT, drawn + 1
        if tokens + length > CAPACITY:
            if len(buffer) < BUFFER and not from_buffer:
                buffer.append((length, work))
                continue
            packs.append((tokens, cost))
            tokens, cost = 0, 0.0
            continue
        tokens, cost = tokens + length, cost + work
        if tokens >= EXPECTED:
            packs.append((tokens, cost))
            tokens, cost = 0, 0.0
    return packs
