# SPDX-License-Identifier: Apache-2.0
"""The planned run from flags, with the given parallel sizes or with others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_bagel.cli.cost_settings import cost_inputs
from megatron_bagel.config.architecture import BagelArch, SparseArch
from megatron_bagel.config.flag import check_values
from megatron_bagel.config.parser import Config
from megatron_bagel.config.plan_arguments import PlanArguments
from megatron_bagel.config.resolve import architecture
from megatron_bagel.config.validate import check_consistency, check_numbers, refuse_unsupported_values
from megatron_bagel.costs.inputs import CostInputs
from megatron_bagel.planning.command import PlannedRun
from megatron_bagel.planning.models import model_named

_SEARCHED = frozenset({
    "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "num_layers_per_virtual_pipeline_stage", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage",
    "context_parallel_size", "recompute_granularity", "recompute_method", "recompute_num_layers", "recompute_modules",
    "gradient_accumulation_steps", "num_shard", "expert_model_parallel_size", "expert_tensor_parallel_size",
})  # fmt: skip


def resolve_plan(config: Config, options: PlanArguments) -> PlannedRun:
    """Return the run that the flags describe.

    Args:
        config: Flags of training.
        options: Flags of the plan.

    Raises:
        ValueError: with the flag that is wrong.
    """
    check_values(options)
    arch = planned_model(options.model, config)
    if options.search:
        # The search takes every refusal for a size that does not fit. Refuse first what is wrong with any parallel sizes.
        refuse_unsupported_values(config)
        check_numbers(config)
        check_consistency(config)

    def inputs_of(settings: dict[str, Any]) -> CostInputs:
        return cost_inputs(with_sizes(config, options.gpus, settings) if settings else config, arch, options.gpus)

    return PlannedRun(arch, config.data.max_num_tokens, config.training.peak_device_tflops, inputs_of, config.training.save_every)


def with_sizes(config: Config, gpus: int, settings: dict[str, Any]) -> Config:
    """Return ``config`` with other sizes, as if flags had given them. Without a given global batch, its global batch stays too."""
    batch = config.megatron.global_batch_size or gpus * config.training.gradient_accumulation_steps
    given_names = {name for name, value in settings.items() if value not in (None, [])}
    return replace(
        config,
        megatron=replace(
            config.megatron, global_batch_size=batch, num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None,
            num_layers_per_virtual_pipeline_stage=None, **{"recompute_modules": [], "recompute_method": "uniform", **settings},
        ),
        given=(config.given - _SEARCHED) | given_names,
    )  # fmt: skip


def planned_model(name: str | None, config: Config) -> BagelArch:
    """Return a named size or the model of a folder, changed by given flags of training. Without a name, the flags describe the model."""
    if name is None:
        return architecture(config)
    arch, model, training, given = model_named(name), config.model, config.training, config.given
    flag_of = {"qk_norm": "llm_qk_norm"}
    llm: dict[str, Any] = {
        "layer_module": model.layer_module,
        "qk_norm": model.llm_qk_norm,
        "tie_word_embeddings": model.tie_word_embeddings,
    }
    experts = config.megatron.llm_settings()
    if experts:
        llm["sparse"] = SparseArch.from_hf({**arch.llm.to_hf(), **experts})
    sizes = {name: getattr(model, name) for name in ("max_latent_size", "latent_patch_size") if name in given}
    return replace(
        arch,
        llm=replace(arch.llm, **{name: value for name, value in llm.items() if name == "sparse" or flag_of.get(name, name) in given}),
        vit=arch.vit if training.visual_und else None,
        autoencoder=arch.autoencoder if training.visual_gen else None,
        **sizes,
    )
