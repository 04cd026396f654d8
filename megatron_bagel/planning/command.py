"""What ``python -m megatron_bagel.plan`` answers."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from megatron_bagel.config.flag import check_values
from megatron_bagel.config.parser import Config
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.planning.gpus import assumptions_of, gpu_of
from megatron_bagel.planning.models import planned_model
from megatron_bagel.planning.parallel_plan import ParallelPlan, Problem, plan_layout
from megatron_bagel.planning.report import memory_picture, plan_text, search_text, tables_of_names
from megatron_bagel.planning.search import search
from megatron_bagel.planning.workload import Mix, typical_pack


def problem_of(config: Config, wanted: PlanArguments) -> Problem:
    """Model, machine and pack that the flags describe. Raises ValueError naming the flag that is wrong."""
    check_values(wanted)
    arch = planned_model(wanted.model, config)
    pack = typical_pack(arch, Mix.of(wanted), config.data.max_num_tokens)
    return Problem(arch, gpu_of(wanted, config.training.peak_device_tflops), wanted.gpus, assumptions_of(wanted), pack)


def answer(config: Config, wanted: PlanArguments) -> str:
    """The text to print. Raises ValueError for settings that cannot work, and for a search that finds nothing."""
    if wanted.list_models:
        return tables_of_names()
    problem = problem_of(config, wanted)
    if wanted.search:
        found = search(config, problem)
        best = found[: wanted.best]
        text = _json(best, problem) if wanted.json else search_text(best, len(found), problem)
        plan = best[0]
    else:
        plan = plan_layout(config, problem)
        text = _json([plan], problem) if wanted.json else plan_text(plan, problem)
    if wanted.png is not None:
        memory_picture(plan, problem, wanted.png)
    return text


def _json(plans: list[ParallelPlan], problem: Problem) -> str:
    gpu: dict[str, Any] = {**asdict(problem.gpu), "tflops": problem.gpu.tflops}
    return json.dumps(
        {"gpus": problem.gpus, "gpu": gpu, "assumed": asdict(problem.assumed), "plans": [plan.to_dict() for plan in plans]}, indent=2
    )
