"""The modules of a model that only answers: every rank has all layers, cut by tensor parallelism alone, and nothing trains."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_bagel import platform
from megatron_bagel.assembly.opened_model import OpenedModel
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import check_parallel_sizes
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.build import build_decoder
from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing


def filled_modules(model: OpenedModel, dtype: torch.dtype) -> tuple[BagelModel, VisionTower | None]:
    """Decoder and vision tower in ``dtype`` on this rank's device, with the weights of ``model``. Moves its autoencoder there, too.

    Raises ValueError for a tensor-parallel size that the model cannot be cut by, and for tensors that are missing or left over.
    """
    arch, ranks = model.arch, parallel_state.get_tensor_model_parallel_world_size()
    megatron = MegatronArguments(tensor_model_parallel_size=ranks)
    check_parallel_sizes(megatron, arch.llm)
    # Random weights would only be overwritten. Megatron marks the weights that ranks share only where it initialises them.
    nothing: dict[str, Any] = {"init_method": _as_it_is, "output_layer_init_method": _as_it_is, "perform_initialization": ranks > 1}
    config = transformer_config(arch.llm, megatron, bf16=dtype is torch.bfloat16, on_cpu=not platform.has_gpu(), **nothing)
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


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    """Initialisation of weights that are about to be loaded."""
    return weight
