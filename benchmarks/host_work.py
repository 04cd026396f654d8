# SPDX-License-Identifier: Apache-2.0
"""Work of a rank's host per step against the number of ranks: planning the global batch, dividing it, laying out this rank's packs.

    python -m benchmarks.host_work                       # 64, 1,024 and 16,384 data-parallel replicas, one pack each
    python -m benchmarks.host_work --replicas 64 --mix images

Every rank plans the whole global batch, so this is what grows with the run. It happens in the loader's workers, which run ahead. The
training process itself does not do it: its own share is the exchange of counts and the layout's tensors, which do not depend on the number
of ranks. Times are processor seconds of one core, means over steps of at least 8,192 packs, because packs are planned in blocks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from benchmarks.data_mixes import CAPACITY, EXPECTED, Lengths  # noqa: E402
from benchmarks.long_packs import LONG, image_heavy  # noqa: E402
from benchmarks.record import report  # noqa: E402
from megatron_bagel.data.planner.assign import assign_packs  # noqa: E402
from megatron_bagel.data.planner.planner import Planner, PlannerConfig  # noqa: E402
from megatron_bagel.layout.cp_partition import context_orders, padded_length  # noqa: E402
from megatron_bagel.layout.pack import build_pack  # noqa: E402

#: Packs that are planned at least for a size.
PACKS = 8192


def spent(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` returns, and its processor seconds."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def measure(replicas: int, mix: str, steps: int, replica: int = 0) -> dict[str, Any]:
    """Seconds per step of one rank of ``replicas`` data-parallel replicas with a pack each."""
    planner = Planner([Lengths(mix)], PlannerConfig(CAPACITY, EXPECTED, CAPACITY, 50, seed=1, global_batch_size=replicas))
    planned, divided, samples = [], [], []
    # Packs are planned in blocks, so few steps of few packs would not meet the start of one.
    for step in range(max(steps, -(-PACKS // replicas))):
        packs, seconds = spent(lambda step=step: planner.batch(step))
        planned.append(seconds)
        samples.append(sum(len(pack.samples) for pack in packs))
        _, seconds = spent(lambda packs=packs: assign_packs(packs, replicas)[replica])
        divided.append(seconds)
    items = image_heavy()
    laid_out = [
        spent(lambda: context_orders(pack := build_pack(items, LONG), 2, padded_length(pack.sequence_length, 2, 1)))[1]
        for _ in range(steps)
    ]
    return {
        "packs": replicas,
        "steps": len(planned),
        "samples": statistics.mean(samples),
        "plan_s": statistics.mean(planned),
        "slowest_plan_s": max(planned),
        "divide_s": statistics.mean(divided),
        "layout_of_one_pack_s": statistics.median(laid_out),
        "microseconds_per_pack": (statistics.mean(planned) + statistics.mean(divided)) / replicas * 1e6,
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[64, 1024, 16384], help="data-parallel replicas (default 64 1024 16384)")
    parser.add_argument("--mix", choices=("lognormal", "images"), default="images", help="lengths of samples (default images)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps (default 4)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    if min(*arguments.replicas, arguments.steps) < 1:
        parser.error("--replicas and --steps must be at least 1")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    arguments = parse_arguments(argv)
    by_replicas = {str(replicas): measure(replicas, arguments.mix, arguments.steps) for replicas in arguments.replicas}
    result = {"mix": arguments.mix, "capacity": CAPACITY, "replicas": by_replicas}
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
