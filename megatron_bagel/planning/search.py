"""Every layout that the model can be cut into and the machine can hold, quickest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.planning.parallel_plan import ParallelPlan, Problem, plan_layout

#: Tried in turn: settings of recomputation, from what costs least time to what costs least memory.
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
#: From settings, by flag name, to what a run with them costs. Raises ValueError for sizes that do not fit.
InputsOf = Callable[[dict[str, Any]], CostInputs]


def search(problem: Problem, inputs_of: InputsOf) -> list[ParallelPlan]:
    """Layouts that fit, by predicted step time; of equal axes the least recomputation that fits.

    Args:
        problem: model, machine and pack.
        inputs_of: gives the run with the sizes and the recomputation that are tried. Whatever it refuses counts as a size that does
            not fit, so all other settings must have been checked before.

    Raises:
        ValueError: nothing fits; names the nearest miss.
    """
    tokens_of, found, nearest = problem.tokens_of(), [], None
    for sizes in _sizes(problem):
        for recompute in RECOMPUTE:
            try:
                plan = plan_layout(inputs_of({**sizes, **recompute}), problem, tokens_of)
            except ValueError:
                break  # sizes that this model, batch or number of GPUs cannot be cut into
            if plan.fits:
                found.append(plan)
                break
            nearest = plan if nearest is None or plan.peak_bytes < nearest.peak_bytes else nearest
    if not found:
        miss = f"; the nearest is {nearest.name} with {nearest.peak_bytes / 2**30:.1f} GiB" if nearest else ""
        machine = f"{problem.gpus} x {problem.gpu.name}, {problem.memory_bytes / 2**30:.1f} GiB of each for a run"
        raise ValueError(
            f"no layout of this model fits {machine}{miss}. Raise --gpus, lower --max_num_tokens, or give --recompute_vit True"
        )
    return sorted(found, key=lambda plan: (plan.estimate.step_time_s, plan.peak_bytes))


def _sizes(problem: Problem) -> Iterator[dict[str, Any]]:
    layers = problem.arch.llm.num_hidden_layers
    for tensor in _powers(min(problem.gpu.gpus_per_node, problem.gpus)):
        for stages in [size for size in range(1, layers + 1) if layers % size == 0]:
            chunks = [None] if stages == 1 else [None, *(c for c in (2, 4) if layers % (stages * c) == 0 and stages > 1)]
            for context in _powers(min(16, problem.gpus)):
                if problem.gpus % (tensor * stages * context):
                    continue
                for virtual in chunks:
                    yield {
                        "tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1, "pipeline_model_parallel_size": stages,
                        "virtual_pipeline_model_parallel_size": virtual, "context_parallel_size": context,
                    }  # fmt: skip


def _powers(most: int) -> list[int]:
    return [2**power for power in range(most.bit_length())]
