# SPDX-License-Identifier: Apache-2.0
"""The data path, as JSON, beside a plain reader that follows the original's algorithm (`plain_reader.py`, `data_mixes.py`).

python -m benchmarks.data --mix lognormal          # fill and balance of packs of 36864 tokens, 64 replicas; also --mix images
python -m benchmarks.data --part sample            # fill on sample data, packs of 1024 tokens
python -m benchmarks.data --part loader            # samples per second of one worker, and that pixels are the same
python -m benchmarks.data --part stages            # where the time of a sample goes: decode, resize, send, normalize, ...
python -m benchmarks.data --part start             # seconds to the first pack of 2000 rows, and of a quarter of them
python -m benchmarks.data --part plan              # planning an epoch of 10 M samples of a synthetic sidecar: seconds, memory
python -m benchmarks.data --part open              # opening a synthetic sidecar of 100 M samples: seconds, memory
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from benchmarks.data_mixes import CAPACITY, EXPECTED, Lengths, greedy_packs  # noqa: E402
from benchmarks.data_reading import measure_fill, measure_loader, measure_start  # noqa: E402
from benchmarks.data_scale import measure_opening, measure_planning  # noqa: E402
from benchmarks.data_stages import measure_stages  # noqa: E402
from benchmarks.record import report  # noqa: E402
from megatron_bagel.data.planner.assign import assign_packs  # noqa: E402
from megatron_bagel.data.planner.planner import Planner, PlannerConfig  # noqa: E402


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
    steps = [assign_packs(planner.batch(step), replicas) for step in range(packs // replicas)]
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


def parser() -> argparse.ArgumentParser:
    """Every size has a default that is the full-size measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("packing", "sample", "loader", "stages", "start", "plan", "open"), default="packing")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    packing = parser.add_argument_group("packing")
    packing.add_argument("--mix", choices=("lognormal", "images"), default="lognormal")
    packing.add_argument("--packs", type=int, default=640, help="of sample and loader too")
    packing.add_argument("--replicas", type=int, default=64)
    packing.add_argument("--window", type=int, default=50, help="as --max_buffer_size")
    reading = parser.add_argument_group("sample, loader, stages and start")
    reading.add_argument("--rows", type=int, default=2000)
    reading.add_argument("--side", type=int, default=64, help="pixels of the pictures")
    reading.add_argument("--capacity", type=int, default=1024, help="tokens of a pack")
    reading.add_argument("--repeats", type=int, default=5)
    scale = parser.add_argument_group("plan and open")
    scale.add_argument("--samples", type=int, help="default: 10 million to plan, 100 million to open")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    parse = parser()
    args = parse.parse_args(argv)
    if not 1 <= args.replicas <= args.packs:
        parse.error(f"--packs {args.packs} must be at least --replicas {args.replicas}")
    parts: dict[str, Callable[[], dict[str, object]]] = {
        "packing": lambda: measure(args.mix, args.packs, args.replicas, args.window),
        "sample": lambda: measure_fill(args.rows, args.side, args.capacity, args.packs),
        "loader": lambda: measure_loader(args.rows, args.side, args.capacity, args.packs, args.repeats),
        "stages": lambda: measure_stages(args.rows, args.side, args.capacity, args.packs),
        "start": lambda: measure_start(args.rows, args.side, args.capacity, args.repeats),
        "plan": lambda: measure_planning(args.samples or 10_000_000),
        "open": lambda: measure_opening(args.samples or 100_000_000),
    }
    report(parts[args.part](), args.output)


if __name__ == "__main__":
    main()
