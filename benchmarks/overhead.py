# SPDX-License-Identifier: Apache-2.0
"""What metrics, the watchdog and the checks of each step cost, as a share of a training step, as JSON.

    python -m benchmarks.overhead --config bench-53m

Each part is called many times by itself and its CPU time is counted, with the step's own CPU time beside it: on a busy machine wall clocks
would measure the neighbours, and a difference of two step times would drown 1 % in noise. One process; what ranks wait for each other
is not overhead of these parts: they add numbers to exchanges that exist without them.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

import torch

from megatron_bagel import platform

platform.install()

from benchmarks.measure import Stopwatch  # noqa: E402
from benchmarks.named_configs import CONFIGS, bench_pack  # noqa: E402
from benchmarks.record import report  # noqa: E402
from benchmarks.step import BenchStep  # noqa: E402
from benchmarks.step_record import step_done, step_record  # noqa: E402
from megatron_bagel.cli.resolve_run import resilience_settings  # noqa: E402
from megatron_bagel.config.parser import Config  # noqa: E402
from megatron_bagel.costs.flops import StepWork, mfu_flops, work_flops  # noqa: E402
from megatron_bagel.platform.device import device_name  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402
from megatron_bagel.training.losses import StepLosses  # noqa: E402
from megatron_bagel.training.observability.logging_sinks import RunLog  # noqa: E402
from megatron_bagel.training.observability.metrics import RateWindow  # noqa: E402
from megatron_bagel.training.resilience.bad_steps import Attempt  # noqa: E402
from megatron_bagel.training.resilience.run_monitors import Survival  # noqa: E402


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=sorted(CONFIGS), default="bench-53m")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; the median of their CPU time counts")
    parser.add_argument("--calls", type=int, default=200, help="calls of each part")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.calls < 1:
        parser.error("--steps and --calls must be at least 1")
    return arguments


def cpu_seconds(work: Callable[[], object], calls: int) -> float:
    """CPU seconds of this process for one call, over many."""
    work()
    before = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - before) / calls


def step_seconds(name: str, steps: int) -> tuple[float, float]:
    """(CPU, wall) seconds of a training step, medians after one step of warm-up."""
    step, watch = BenchStep(CONFIGS[name].arch, bench_pack(CONFIGS[name])), Stopwatch(0)
    step.run(watch)
    taken = []
    for _ in range(steps):
        cpu, wall = time.process_time(), time.perf_counter()
        step.run(watch)
        taken.append((time.process_time() - cpu, time.perf_counter() - wall))
    return sorted(cpu for cpu, _ in taken)[steps // 2], sorted(wall for _, wall in taken)[steps // 2]


def part_seconds(name: str, folder: Path, calls: int, step_wall_s: float) -> dict[str, float]:
    """CPU seconds per step of each part, with the flags' defaults."""
    config = Config.from_values({"results_dir": str(folder)})
    resilience = resilience_settings(config, "train")
    survival = Survival.of(resilience)
    good = Attempt(StepLosses(1.0, 0.5, 0.5), 1.0, torch.zeros(0))
    work, arch, window = StepWork.of(bench_pack(CONFIGS[name])), CONFIGS[name].arch, RateWindow(1.0, 1)
    log, metrics, done = RunLog(folder, 0, 0), step_record(work), step_done(work, 1)

    def stragglers() -> None:
        survival.stragglers.before_step(1)
        survival.stragglers.data_loaded()
        survival.stragglers.batch_settled()
        survival.stragglers.gradients_ready()
        survival.stragglers.after_step(done)

    def rates() -> None:
        window.add(work.tokens, mfu_flops(arch.llm, work), work_flops(arch, work).total)

    parts = {
        "agreement": cpu_seconds(lambda: survival.agreement.exchange(0), calls),
        "judging": cpu_seconds(lambda: survival.bad_steps.attempt(0, lambda: good), calls),
        "watchdog_progress": cpu_seconds(lambda: survival.watchdog.progress(1), calls),
        "watchdog_thread": cpu_seconds(survival.watchdog._post, calls) * step_wall_s / resilience.limits.interval,
        "stragglers": cpu_seconds(stragglers, calls),
        "rates": cpu_seconds(rates, calls),
        "log_line": cpu_seconds(lambda: log.log(metrics), calls) / config.training.log_every,
    }
    log.close(plot=False)
    return parts


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    from megatron.core import parallel_state, tensor_parallel

    arguments = parse_arguments(argv)
    logger = logging.getLogger("megatron_bagel")
    level = logger.level
    init_distributed()
    try:
        parallel_state.initialize_model_parallel()
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        cpu_s, wall_s = step_seconds(arguments.config, arguments.steps)
        logger.setLevel(logging.ERROR)  # the JSON alone
        with tempfile.TemporaryDirectory() as folder:
            parts = part_seconds(arguments.config, Path(folder), arguments.calls, wall_s)
    finally:
        logger.setLevel(level)
        shutdown_distributed()
    total = sum(parts.values())
    result = {
        "config": arguments.config, "device": device_name(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "step_cpu_s": cpu_s, "step_wall_s": wall_s, "parts_cpu_s": parts, "overhead_cpu_s": total, "share_of_step": total / cpu_s,
    }  # fmt: skip
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
