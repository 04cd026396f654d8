"""What ``python -m megatron_bagel.plan`` answers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.planning.gpus import assumptions_of, gpu_of
from megatron_bagel.planning.parallel_plan import ParallelPlan, Problem, plan_layout
from megatron_bagel.planning.report import memory_picture, plan_text, search_text
from megatron_bagel.planning.search import InputsOf, search
from megatron_bagel.planning.workload import Mix, typical_pack


@dataclass(frozen=True)
class PlannedRun:
    """The training run that is planned.

    Attributes:
        arch: its model.
        capacity: tokens that a pack holds at most.
        peak_tflops: peak rate of a GPU; 0 is the table's.
        inputs_of: gives what it costs, with other sizes than it was asked for where there are any.
    """

    arch: BagelArch
    capacity: int
    peak_tflops: float
    inputs_of: InputsOf


def problem_of(planned: PlannedRun, wanted: PlanArguments) -> Problem:
    """Model, machine and pack. Raises ValueError naming the flag that is wrong."""
    pack = typical_pack(planned.arch, Mix.of(wanted), planned.capacity)
    return Problem(planned.arch, gpu_of(wanted, planned.peak_tflops), wanted.gpus, assumptions_of(wanted), pack)


def answer(planned: PlannedRun, wanted: PlanArguments) -> str:
    """The text to print. Raises ValueError for settings that cannot work, and for a search that finds nothing."""
    problem = problem_of(planned, wanted)
    if wanted.search:
        found = search(problem, planned.inputs_of)
        best = found[: wanted.best]
        text = _json(best, problem) if wanted.json else search_text(best, len(found), problem)
        plan = best[0]
    else:
        plan = plan_layout(planned.inputs_of({}), problem)
        text = _json([plan], problem) if wanted.json else plan_text(plan, problem)
    if wanted.png is not None:
        memory_picture(plan, problem, wanted.png)
    return text


def _json(plans: list[ParallelPlan], problem: Problem) -> str:
    gpu: dict[str, Any] = {**asdict(problem.gpu), "tflops": problem.gpu.tflops}
    return json.dumps(
        {"gpus": problem.gpus, "gpu": gpu, "assumed": asdict(problem.assumed), "plans": [plan.to_dict() for plan in plans]}, indent=2
    )
