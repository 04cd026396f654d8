# SPDX-License-Identifier: Apache-2.0
"""What watching a run costs: processor time of the timers of a step and of everything that a logged step computes and writes.

    python -m benchmarks.observing --config bench-53m

Beside it the processor time of a step of that config, and the share of it when every single step is logged (--log_every 1). Times are
of the processor, so a busy machine does not change the verdict much.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel import platform

platform.install()

from benchmarks.measure import Stopwatch  # noqa: E402
from benchmarks.named_configs import CONFIGS, bench_pack  # noqa: E402
from benchmarks.record import report  # noqa: E402
from benchmarks.step import BenchStep  # noqa: E402
from benchmarks.step_record import step_record  # noqa: E402
from megatron_bagel.costs.flops import StepWork  # noqa: E402
from megatron_bagel.data.loading.planned_steps import BatchTotals  # noqa: E402
from megatron_bagel.layout.pack import Pack  # noqa: E402
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed  # noqa: E402
from megatron_bagel.training.observability.logging_sinks import RunLog  # noqa: E402
from megatron_bagel.training.observability.step_stats import compared_over_ranks, composition  # noqa: E402
from megatron_bagel.training.observability.timers import DEVICE_PHASES, Timers  # noqa: E402
from megatron_bagel.training.step_result import TaskCounts  # noqa: E402


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    from megatron.core import parallel_state, tensor_parallel

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=sorted(CONFIGS), default="bench-53m")
    parser.add_argument("--rounds", type=int, default=200, help="repetitions of what is cheap; their mean is reported")
    parser.add_argument("--steps", type=int, default=2, help="measured steps, after one")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    init_distributed()
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    config = CONFIGS[arguments.config]
    pack = bench_pack(config)
    step, watch = BenchStep(config.arch, pack), Stopwatch(0)
    step.run(watch)
    step_s = processor_time(lambda: step.run(watch), arguments.steps)
    costs = observing_costs(pack, arguments.rounds)
    result = {"config": arguments.config, "step_s": step_s, **costs, "share_when_all_are_logged": sum(costs.values()) / step_s}
    shutdown_distributed()
    report(result, arguments.output)
    return result


def processor_time(work: Callable[[], object], rounds: int) -> float:
    """Seconds of processor time of one of ``rounds`` repetitions, all threads of this process together."""
    began = time.process_time()
    for _ in range(rounds):
        work()
    return (time.process_time() - began) / rounds


def observing_costs(pack: Pack, rounds: int) -> dict[str, float]:
    """Seconds per step: the timers of a step; counting and comparing, and writing everywhere, of a logged one."""
    timers, work = Timers(), StepWork.of(pack)
    tasks = tuple(sorted({sample.dataset for sample in pack.samples}))
    loaded = SimpleNamespace(pack=pack, plan=SimpleNamespace(cost=1.0))
    batch = SimpleNamespace(packs=[loaded], totals=BatchTotals(1, len(pack.samples), 1.0))

    def one_step() -> None:
        for phase in ("data", *DEVICE_PHASES):
            with timers(phase):
                pass

    def observed() -> dict[str, float]:
        counts = TaskCounts.of([loaded], tasks)
        found = composition(work, TaskCounts.from_list(counts.to_list(), tasks), 1, pack.sequence_length)
        return found | compared_over_ranks(timers.read(1), batch, work.tokens, 1)

    one_step()
    numbers = observed()
    with tempfile.TemporaryDirectory() as folder:
        with redirect_stdout(sys.stderr):  # stdout has the result alone
            log = RunLog(folder, 0, 0, prometheus=f"{folder}/bagel.prom")
        steps = iter(range(rounds))
        costs = {
            "timers_s": processor_time(one_step, rounds),
            "counting_and_comparing_s": processor_time(observed, rounds),
            "writing_s": processor_time(lambda: log.log(step_record(work, next(steps), numbers)), rounds),
        }
        log.close(plot=False)
    return costs


if __name__ == "__main__":
    main()
