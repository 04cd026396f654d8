# SPDX-License-Identifier: Apache-2.0
"""Work of a rank's host per step against the number of ranks: planning the global batch, dividing it, laying out this rank's packs.

    python -m benchmarks.host_work                       # 64, 1,024 and 16,384 data-parallel replicas, one pack each
    python -m benchmarks.host_work --replicas 64 --mix images

Every rank plans the whole global batch, so this is what grows with the run. From 256 packs per step on, a process of its own plans ahead
of training (``data/loading/planned_steps.py``). Two figures per number of ranks:

* ``training_process_s``: processor seconds of the training process per step, to take over the step that was planned;
* ``planning_process_s``: processor seconds of the planning process per step. It is hidden as long as a step takes longer.

The layout of this rank's packs happens in the loader's workers and does not depend on the number of ranks. All are seconds of one core,
means over steps of at least 8,192 packs, because packs are planned in blocks.
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
from megatron_bagel.config.batch_size import BatchSizes  # noqa: E402
from megatron_bagel.data.loading.planned_steps import LARGE_BATCH, PlannedSteps, StepPlanner  # noqa: E402
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
    # Packs are planned in blocks, so few steps of few packs would not meet the start of one.
    steps = max(steps, -(-PACKS // replicas))
    here = StepPlanner(_planner(mix, replicas), replica, replicas)
    planned = [spent(lambda step=step: here.plan((step * replicas, replicas))) for step in range(steps)]
    aside = PlannedSteps(StepPlanner(_planner(mix, replicas), replica, replicas), BatchSizes.of(replicas, []), 0, replicas >= LARGE_BATCH)
    taken = [spent(aside.next) for _ in range(steps)]
    aside.close()
    if [step.plans for step, _ in taken] != [step.plans for step, _ in planned]:
        raise RuntimeError("the planning process planned other packs")
    items = image_heavy()
    laid_out = [
        spent(lambda: context_orders(pack := build_pack(items, LONG), 2, padded_length(pack.sequence_length, 2, 1)))[1] for _ in range(4)
    ]
    return {
        "packs": replicas,
        "steps": steps,
        "samples": statistics.mean(step.totals.samples for step, _ in planned),
        "training_process_s": statistics.mean(seconds for _, seconds in taken),
        "slowest_training_process_s": max(seconds for _, seconds in taken),
        "planning_process_s": statistics.mean(seconds for _, seconds in planned),
        "layout_of_one_pack_s": statistics.median(laid_out),
        "planning_microseconds_per_pack": statistics.mean(seconds for _, seconds in planned) / replicas * 1e6,
    }


def _planner(mix: str, replicas: int) -> Planner:
    return Planner([Lengths(mix)], PlannerConfig(CAPACITY, EXPECTED, CAPACITY, 50, seed=1, global_batch_size=replicas))


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
