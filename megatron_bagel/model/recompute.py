"""Selective recompute: parts of a layer whose results are dropped after the forward pass and computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Whether ``module`` ("core_attn", "mlp") is among the recomputed ones."""
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def recomputed(function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """``function(*tensors)``, of which only the inputs are kept. Without gradients there is nothing to save, and it is just called."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return tensor_parallel.checkpoint(function, False, *tensors)
