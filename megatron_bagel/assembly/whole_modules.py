# SPDX-License-Identifier: Apache-2.0
"""Builds the modules of a model for inference: every rank has all layers, sharded by tensor parallelism only, and nothing trains."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_bagel import platform
from megatron_bagel.assembly.opened_model import OpenedModel
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.moe_rules import check_expert_sizes
from megatron_bagel.config.parallel_sizes import check_parallel_sizes
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.build import build_decoder
from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing


def filled_modules(model: OpenedModel, dtype: torch.dtype) -> tuple[BagelModel, VisionTower | None]:
    """Build decoder and vision tower in ``dtype`` on this rank's device, with the weights of ``model``, and move its autoencoder there.

    Raises:
        ValueError: The tensor-parallel size does not divide the model, or tensors are missing or unexpected.
    """
    arch, ranks = model.arch, parallel_state.get_tensor_model_parallel_world_size()
    experts = parallel_state.get_expert_model_parallel_world_size()
    megatron = MegatronArguments(
        tensor_model_parallel_size=ranks, expert_model_parallel_size=experts,
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
    )  # fmt: skip
    check_parallel_sizes(megatron, arch.llm)
    check_expert_sizes(megatron, arch.llm, training=False)
    # Random weights would only be overwritten. Megatron marks sharded weights only when it initialises them.
    no_init: dict[str, Any] = {"init_method": _unchanged, "output_layer_init_method": _unchanged, "perform_initialization": ranks > 1}
    config = transformer_config(arch.llm, megatron, bf16=dtype is torch.bfloat16, on_cpu=not platform.has_gpu(), **no_init)
    initialize_kv_sharing(arch.llm.num_key_value_heads)
    decoder = build_decoder(arch, config)
    vision_tower = VisionTower(arch) if arch.vit else None
    modules: list[nn.Module] = [module for module in (decoder, vision_tower) if module is not None]
    model.fill(modules)
    for module in modules:
        module.to(platform.device(), dtype).eval().requires_grad_(False)
    if model.autoencoder is not None:
        model.autoencoder.to(platform.device())
    return decoder, vision_tower


def _unchanged(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight without initialising it, because it will be loaded."""
    return weight
