# SPDX-License-Identifier: Apache-2.0
"""Selective recompute: some parts of a layer drop their results after the forward pass and compute them again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_config import TransformerConfig


def recomputes(config: TransformerConfig, module: str) -> bool:
    """Return whether ``module`` ("core_attn", "mlp") is recomputed under ``config``."""
    return config.recompute_granularity == "selective" and module in (config.recompute_modules or ())


def recomputed(function: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """Return ``function(*tensors)`` and keep only the inputs for the backward pass. Without gradients it is a plain call."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    return tensor_parallel.checkpoint(function, False, *tensors)
