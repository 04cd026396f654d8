"""Packing, as JSON: fill of packs and balance between replicas of the planner, beside the original's greedy packing.

    python -m benchmarks.data --mix lognormal --packs 640 --replicas 64

The baseline packs as the original's data loader does (behaviour known from its runs): every rank for itself, samples in stream
order, an overflow buffer that is tried first below ``prefer_buffer_before``, a pack given out at ``expected_num_tokens`` or when
the buffer is full. Lengths are synthetic; no pixels, no disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel.data.counts import COST_UNIT, CostModel, Measures  # noqa: E402
from megatron_bagel.data.keyed_random import keyed_integers, keyed_uniform  # noqa: E402
from megatron_bagel.data.planner import Planner, PlannerConfig  # noqa: E402
from megatron_bagel.data.planner_deal import deal  # noqa: E402

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


def imbalance(steps: Sequence[Sequence[float]]) -> float:
    """Mean over steps of the busiest replica's load over the mean load."""
    return float(np.mean([max(loads) / np.mean(loads) for loads in steps]))


def measure(mix: str, packs: int, replicas: int, window: int) -> dict[str, object]:
    """Both packings over ``packs`` packs, ``replicas`` of them per step."""
    source = Lengths(mix)
    config = PlannerConfig(CAPACITY, EXPECTED, CAPACITY, window, seed=1, global_batch_size=replicas)
    planner = Planner([source], config)
    started = time.perf_counter()
    planner.batch(0)
    first = time.perf_counter() - started
    steps = [deal(planner.batch(step), replicas) for step in range(packs // replicas)]
    seconds = time.perf_counter() - started
    plans = [pack for step in steps for hand in step for pack in hand]
    greedy = [greedy_packs(source, rank, replicas, packs // replicas) for rank in range(replicas)]
    return {
        "mix": mix,
        "packs": len(plans),
        "replicas": replicas,
        "window": window,
        "planner": {
            "fill": float(np.mean([pack.tokens for pack in plans]) / CAPACITY),
            "token_imbalance": imbalance([[sum(pack.tokens for pack in hand) for hand in step] for step in steps]),
            "cost_imbalance": imbalance([[sum(pack.cost for pack in hand) for hand in step] for step in steps]),
            "first_batch_s": first,
            "microseconds_per_sample": seconds / sum(len(pack.samples) for pack in plans) * 1e6,
        },
        "greedy": {
            "fill": float(np.mean([tokens for rank in greedy for tokens, _ in rank]) / CAPACITY),
            "token_imbalance": imbalance([[rank[step][0] for rank in greedy] for step in range(packs // replicas)]),
            "cost_imbalance": imbalance([[rank[step][1] for rank in greedy] for step in range(packs // replicas)]),
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", choices=("lognormal", "images"), default="lognormal")
    parser.add_argument("--packs", type=int, default=640)
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--window", type=int, default=50, help="as --max_buffer_size")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.replicas <= arguments.packs:
        parser.error(f"--packs {arguments.packs} must be at least --replicas {arguments.replicas}")
    print(json.dumps(measure(arguments.mix, arguments.packs, arguments.replicas, arguments.window), indent=1))


if __name__ == "__main__":
    main()
