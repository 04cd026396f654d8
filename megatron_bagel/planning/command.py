# SPDX-License-Identifier: Apache-2.0
"""Computes the answer of ``python -m megatron_bagel.plan``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.planning.goodput import Goodput, Reliability, goodput
from megatron_bagel.planning.gpus import assumptions_of, gpu_of
from megatron_bagel.planning.parallel_plan import ParallelPlan, Problem, make_plan
from megatron_bagel.planning.report import goodput_text, memory_picture, plan_text, search_text
from megatron_bagel.planning.search import InputsOf, search
from megatron_bagel.planning.workload import Mix, typical_pack


@dataclass(frozen=True)
class PlannedRun:
    """The training run that is planned.

    Attributes:
        arch: Its model.
        capacity: The capacity of a pack in tokens.
        peak_tflops: The peak rate of a GPU; 0 for the rate in the table.
        inputs_of: Returns the cost inputs of the run, with other settings in place of the flags' if there are any.
        save_every: The steps between checkpoints.
    """

    arch: BagelArch
    capacity: int
    peak_tflops: float
    inputs_of: InputsOf
    save_every: int = 2000

    def goodput(self, plan: ParallelPlan, arguments: PlanArguments) -> Goodput:
        """Return the effect of failures on this run with the step time of a plan."""
        return goodput(plan.estimate.step_time_s, arguments.gpus, self.save_every, Reliability.of(arguments))


def problem_of(planned: PlannedRun, arguments: PlanArguments) -> Problem:
    """Return the model, machine and pack of a plan. Raises ValueError with the flag that is wrong."""
    pack = typical_pack(planned.arch, Mix.of(arguments), planned.capacity)
    return Problem(planned.arch, gpu_of(arguments, planned.peak_tflops), arguments.gpus, assumptions_of(arguments), pack)


def answer(planned: PlannedRun, arguments: PlanArguments) -> str:
    """Return the text to print. Raises ValueError for settings that cannot work, and for a search without a result."""
    problem = problem_of(planned, arguments)
    if arguments.search:
        plans = search(problem, planned.inputs_of)
        best = plans[: arguments.best]
        text = _json(best, problem, planned, arguments) if arguments.json else search_text(best, len(plans), problem)
        plan = best[0]
    else:
        plan = make_plan(planned.inputs_of({}), problem)
        text = _json([plan], problem, planned, arguments) if arguments.json else plan_text(plan, problem)
    if not arguments.json:
        text += f"\n\n{goodput_text(planned.goodput(plan, arguments), Reliability.of(arguments))}"
    if arguments.png is not None:
        memory_picture(plan, problem, arguments.png)
    return text


def _json(plans: list[ParallelPlan], problem: Problem, planned: PlannedRun, arguments: PlanArguments) -> str:
    gpu: dict[str, Any] = {**asdict(problem.gpu), "tflops": problem.gpu.tflops}
    assumed = {**asdict(problem.assumptions), **asdict(Reliability.of(arguments))}
    described = [{**plan.to_dict(), "goodput": planned.goodput(plan, arguments).to_dict()} for plan in plans]
    return json.dumps({"gpus": problem.gpus, "gpu": gpu, "assumed": assumed, "plans": described}, indent=2)
