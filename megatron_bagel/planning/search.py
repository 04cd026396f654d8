# SPDX-License-Identifier: Apache-2.0
"""Searches the parallel sizes that suit the model and fit the machine, and ranks them by predicted step time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.planning.parallel_plan import ParallelPlan, Problem, make_plan

#: Settings of recomputation in the order in which they are tried, from the least time to the least memory.
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
#: Returns the cost inputs of a run with other settings, by flag name. Raises ValueError for sizes that are not possible.
InputsOf = Callable[[dict[str, Any]], CostInputs]


def search(problem: Problem, inputs_of: InputsOf, keeps: Callable[[dict[str, Any]], bool] = lambda sizes: True) -> list[ParallelPlan]:
    """Return the plans that fit, by predicted step time. Each choice of parallel sizes has the least recomputation that fits.

    Args:
        problem: The model, machine and pack.
        inputs_of: Returns the run with the sizes and the recomputation that are tried. A refusal counts as a size that is not
            possible, so all other settings must have been checked before.
        keeps: Returns whether to try some parallel sizes, by flag name.

    Raises:
        ValueError: Nothing fits. The text names the plan that comes nearest.
    """
    tokens_of, plans, nearest = problem.tokens_of(), [], None
    for sizes in filter(keeps, _sizes(problem)):
        for recompute in RECOMPUTE:
            try:
                plan = make_plan(inputs_of({**sizes, **recompute}), problem, tokens_of)
            except ValueError:
                break  # sizes that this model, batch or number of GPUs cannot be divided into
            if plan.fits:
                plans.append(plan)
                break
            nearest = plan if nearest is None or plan.peak_bytes < nearest.peak_bytes else nearest
    if not plans:
        miss = f"; the nearest is {nearest.name} with {nearest.peak_bytes / 2**30:.1f} GiB" if nearest else ""
        machine = f"{problem.gpus} x {problem.gpu.name}, each with {problem.memory_bytes / 2**30:.1f} GiB for a run"
        raise ValueError(
            f"no parallel sizes let this model fit {machine}{miss}. Raise --gpus, lower --max_num_tokens, or pass --recompute_vit True"
        )
    return sorted(plans, key=lambda plan: (plan.estimate.step_time_s, plan.peak_bytes))


def _sizes(problem: Problem) -> Iterator[dict[str, Any]]:
    """Yield the parallel sizes to try, by flag name."""
    layers = problem.arch.llm.num_hidden_layers
    for tensor in _powers(min(problem.gpu.gpus_per_node, problem.gpus)):
        for stages in [size for size in range(1, layers + 1) if layers % size == 0]:
            chunks = [None] if stages == 1 else [None, *(c for c in (2, 4) if layers % (stages * c) == 0 and stages > 1)]
            for context in _powers(min(16, problem.gpus)):
                if problem.gpus % (tensor * stages * context):
                    continue
                for virtual, experts in product(chunks, _expert_sizes(problem, tensor, problem.gpus // stages)):
                    yield {
                        "tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1, "pipeline_model_parallel_size": stages,
                        "virtual_pipeline_model_parallel_size": virtual, "context_parallel_size": context, **experts,
                    }  # fmt: skip


def _expert_sizes(problem: Problem, tensor: int, stage_ranks: int) -> list[dict[str, int]]:
    """Return the sizes of expert parallelism to try. Experts that ranks divide are whole: cutting each of them costs more traffic."""
    sparse = problem.arch.llm.sparse
    if sparse is None:
        return [{}]
    sizes = [size for size in _powers(min(sparse.num_experts, stage_ranks)) if sparse.num_experts % size == 0]
    return [{"expert_model_parallel_size": size, "expert_tensor_parallel_size": tensor if size == 1 else 1} for size in sizes]


def _powers(limit: int) -> list[int]:
    """Return the powers of two up to ``limit``."""
    return [2**power for power in range(limit.bit_length())]
