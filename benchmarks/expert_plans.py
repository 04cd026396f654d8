# SPDX-License-Identifier: Apache-2.0
"""Predicted layouts of a model with sparse experts: the fastest of some parallel sizes that fit, with their memory and expert traffic.

    python -m benchmarks.expert_plans --into docs/sparse_experts.md      # the table between the marks of the page
    python -m benchmarks.expert_plans --gpus 64 --best 10

Nothing here is measured: the page on planning lists what a prediction assumes. Routers are assumed to choose all experts equally often.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel import platform  # noqa: E402

platform.install()

from benchmarks.marked import put_between  # noqa: E402
from benchmarks.record import report  # noqa: E402
from megatron_bagel.cli.resolve_plan import resolve_plan  # noqa: E402
from megatron_bagel.config.parser import Config  # noqa: E402
from megatron_bagel.config.plan_arguments import PlanArguments  # noqa: E402
from megatron_bagel.planning.command import problem_of  # noqa: E402
from megatron_bagel.planning.communication import sent_by_axis  # noqa: E402
from megatron_bagel.planning.parallel_plan import GIB, ParallelPlan  # noqa: E402
from megatron_bagel.planning.search import search  # noqa: E402

MARK = "expert plans"


def row_of(plan: ParallelPlan, gpus: int) -> dict[str, Any]:
    """The figures of one plan. Traffic and memory are those of the stage with most."""
    sent = [sent_by_axis(calls) for calls in plan.calls]
    return {
        "gpus": gpus, "packs": plan.sizes.global_batch_size, "plan": plan.name, "peak_gib": plan.peak_bytes / GIB,
        "expert_gib": max(stage["expert"] for stage in sent) / GIB, "data_gib": max(stage["data"] for stage in sent) / GIB,
        "step_s": plan.estimate.step_time_s, "expert_s": plan.estimate.expert_s, "work_mfu": plan.estimate.work_mfu,
        "parameters": plan.parameters,
    }  # fmt: skip


def best_plans(arguments: argparse.Namespace, gpus: int) -> list[dict[str, Any]]:
    """The fastest plans that fit on ``gpus`` GPUs."""
    wanted = PlanArguments(model=arguments.model, gpu=arguments.gpu, gpus=gpus, search=True)
    packs = gpus * arguments.packs_per_gpu
    planned = resolve_plan(
        Config.from_values({"max_num_tokens": arguments.tokens, "global_batch_size": packs, "overlap_grad_reduce": True}), wanted
    )
    tried = {
        "tensor_model_parallel_size": arguments.tensor, "pipeline_model_parallel_size": arguments.stages,
        "virtual_pipeline_model_parallel_size": [None], "context_parallel_size": [1], "expert_model_parallel_size": arguments.experts,
    }  # fmt: skip
    plans = search(
        problem_of(planned, wanted), planned.inputs_of, lambda sizes: all(sizes[name] in values for name, values in tried.items())
    )
    return [row_of(plan, gpus) for plan in plans[: arguments.best]]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| GPUs | packs per step | parallel sizes | peak GiB | expert traffic, GiB | step s | for expert traffic | work MFU |"
    lines = [head, "| " + " | ".join(["---"] * 8) + " |"]
    lines += [
        f"| {row['gpus']:,} | {row['packs']:,} | {row['plan']} | {row['peak_gib']:.1f} | {row['expert_gib']:.1f} | {row['step_s']:.2f} | "
        f"{row['expert_s']:.2f} | {row['work_mfu']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-30b-a3b-mot", help="named size of the plan, or a folder (default: %(default)s)")
    parser.add_argument("--gpu", default="h100", help="kind of GPU (default: %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[64, 1024], help="numbers of GPUs (default: 64 1024)")
    parser.add_argument("--packs-per-gpu", type=int, default=2, help="of the global batch (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16384, help="capacity of a pack (default: %(default)s)")
    parser.add_argument("--tensor", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes to try (default: 1 2)")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4], help="pipeline stages to try (default: 1 2 4)")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32], help="expert-parallel sizes to try (default: 8 16 32)")
    parser.add_argument("--best", type=int, default=3, help="plans to show for each number of GPUs (default: %(default)s)")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the table between the marks <!-- expert plans --> of this page")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Plan, print one JSON object, and return it."""
    arguments = parse_arguments(argv)
    rows = [row for gpus in arguments.gpus for row in best_plans(arguments, gpus)]
    result = {"model": arguments.model, "gpu": arguments.gpu, "tokens": arguments.tokens, "plans": rows}
    if arguments.into is not None:
        put_between(arguments.into, MARK, table(rows))
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
