# SPDX-License-Identifier: Apache-2.0
"""Weak and strong scaling on paper: the plan's prediction for the fastest parallel sizes that fit, from 256 to 16,384 GPUs.

    python -m benchmarks.scaling --into docs/planning.md           # the tables between the marks of the page
    python -m benchmarks.scaling --gpu b200 --gpus 256 1024

Weak scaling keeps the packs per GPU, strong scaling keeps the global batch. Nothing here is measured: the page on planning lists what a
prediction assumes. Goodput assumes the plan's defaults for failures, restarts and saves, at the best interval of saves.
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
from megatron_bagel.planning.search import search  # noqa: E402

MARK = "scaling"


def best_plan(model: str, gpu: str, gpus: int, packs: int, tokens: int, straggler_share: float) -> dict[str, Any]:
    """The fastest plan that fits, with overlap of gradients and weights."""
    arguments = PlanArguments(model=model, gpu=gpu, gpus=gpus, search=True, straggler_share=straggler_share)
    flags = {"max_num_tokens": tokens, "global_batch_size": packs, "overlap_grad_reduce": True, "overlap_param_gather": True}
    planned = resolve_plan(Config.from_values(flags), arguments)
    plan = search(problem_of(planned, arguments), planned.inputs_of)[0]
    reliability = planned.goodput(plan, arguments)
    rate = plan.work.tokens / reliability.step_time_s
    return {
        "gpu": gpu, "gpus": gpus, "packs": packs, "plan": plan.name, "step_s": reliability.step_time_s, "tokens_per_s": rate,
        "mfu": plan.estimate.mfu, "work_mfu": plan.estimate.work_mfu, "bubble": plan.estimate.bubble, "data_s": plan.estimate.data_s,
        "hours_between_failures": reliability.hours_between_failures, "best_save_every": reliability.best_save_every,
        "ettr": reliability.best_ettr, "useful_tokens_per_s": rate * reliability.best_ettr,
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown; efficiency is useful tokens per second and GPU, beside the first row's."""
    head = "| GPUs | packs per step | parallel sizes | step s | work MFU | failure every | save every | time that trains | efficiency |"
    lines = [head, "| " + " | ".join(["---"] * 9) + " |"]
    first = rows[0]["useful_tokens_per_s"] / rows[0]["gpus"]
    for row in rows:
        efficiency = row["useful_tokens_per_s"] / row["gpus"] / first
        lines.append(
            f"| {row['gpus']:,} | {row['packs']:,} | {row['plan']} | {row['step_s']:.2f} | {row['work_mfu']:.1%} | "
            f"{row['hours_between_failures']:.1f} h | {row['best_save_every']} steps | {row['ettr']:.1%} | {efficiency:.0%} |"
        )
    return "\n".join(lines)


def text(result: dict[str, Any]) -> str:
    """The tables of all GPUs."""
    parts = []
    for gpu, tables in result["gpus"].items():
        for kind, rows in tables.items():
            keeps = f"{rows[0]['packs'] // rows[0]['gpus']} packs per GPU" if kind == "weak" else f"{rows[0]['packs']:,} packs per step"
            parts.append(f"{gpu.upper()}, {kind} scaling ({keeps}):\n\n{table(rows)}")
    return "\n\n".join(parts)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bagel-7b-mot", help="named size of the plan (default: %(default)s)")
    parser.add_argument("--gpu", nargs="+", default=["h100", "b200"], help="kinds of GPUs (default: h100 b200)")
    parser.add_argument("--gpus", type=int, nargs="+", default=[256, 1024, 4096, 16384], help="numbers of GPUs")
    parser.add_argument("--packs-per-gpu", type=int, default=2, help="of weak scaling (default: %(default)s)")
    parser.add_argument("--global-batch", type=int, default=4096, help="packs per step of strong scaling (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=36864, help="capacity of a pack (default: %(default)s)")
    parser.add_argument("--stragglers", type=float, default=0.03, help="share of a step that ranks wait for the slowest (default: 0.03)")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the tables between the marks <!-- scaling --> of this page")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Plan, print one JSON object, and return it."""
    arguments = parse_arguments(argv)
    result: dict[str, Any] = {"model": arguments.model, "tokens": arguments.tokens, "gpus": {}}
    for gpu in arguments.gpu:
        batches = {"weak": lambda gpus: gpus * arguments.packs_per_gpu, "strong": lambda gpus: arguments.global_batch}
        result["gpus"][gpu] = {
            kind: [best_plan(arguments.model, gpu, gpus, packs(gpus), arguments.tokens, arguments.stragglers) for gpus in arguments.gpus]
            for kind, packs in batches.items()
        }
    if arguments.into is not None:
        put_between(arguments.into, MARK, text(result))
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
