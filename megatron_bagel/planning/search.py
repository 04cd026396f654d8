"""Every layout that the model can be cut into and the machine can hold, quickest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_bagel.config.parser import Config
from megatron_bagel.config.validate import check_consistency, check_numbers, refuse_unsupported_values
from megatron_bagel.planning.parallel_plan import ParallelPlan, Problem, plan_layout

#: Tried in turn: settings of recomputation, from what costs least time to what costs least memory.
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)
_SEARCHED = frozenset({
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "context_parallel_size", "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "gradient_accumulation_steps", "num_shard",
})  # fmt: skip


def search(config: Config, problem: Problem) -> list[ParallelPlan]:
    """Layouts that fit, by predicted step time; of equal axes the least recomputation that fits. ``config`` gives all that is not
    searched; its global batch stays, or is one pack per GPU. Raises ValueError when nothing fits, with the nearest miss."""
    # What no layout can mend is told before the search, which takes every refusal for a size that does not fit.
    refuse_unsupported_values(config)
    check_numbers(config)
    check_consistency(config)
    tokens_of, found, nearest = problem.tokens_of(), [], None
    for sizes in _sizes(config, problem):
        for recompute in RECOMPUTE:
            try:
                plan = plan_layout(_with(config, problem, {**sizes, **recompute}), problem, tokens_of)
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


def _sizes(config: Config, problem: Problem) -> Iterator[dict[str, Any]]:
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


def _with(config: Config, problem: Problem, settings: dict[str, Any]) -> Config:
    """``config`` with other axes, as if flags had given them."""
    batch = config.megatron.global_batch_size or problem.gpus * config.training.gradient_accumulation_steps
    given = {name for name, value in settings.items() if value not in (None, [])}
    return replace(
        config,
        megatron=replace(
            config.megatron, global_batch_size=batch, num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None,
            num_layers_per_virtual_pipeline_stage=None, **{"recompute_modules": [], "recompute_method": "uniform", **settings},
        ),
        given=(config.given - _SEARCHED) | given,
    )  # fmt: skip
