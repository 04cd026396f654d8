# SPDX-License-Identifier: Apache-2.0
"""An RMSNorm that supports sequence parallelism, which Megatron-Core's wrapper of torch's norm refuses."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel import platform
from megatron_bagel.model.fused import rms_norm, torch_rms_norm
from megatron_bagel.model.kernels.choice import UsesKernels
from megatron_bagel.model.kernels.eager import EAGER
from megatron_bagel.model.marks import mark


class _Norm(torch.nn.Module):
    """The weight of a norm, with the mark that Megatron needs for sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, sequence_parallel: bool | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums the gradients of marked parameters over the tensor-parallel ranks; each rank saw only some tokens.
        mark(self.weight, sequence_parallel=config.sequence_parallel if sequence_parallel is None else sequence_parallel)


class RMSNorm(_Norm, UsesKernels):
    """Root-mean-square norm over the last dimension.

    Statistics are fp32. The weight multiplies after the cast back to the input's dtype, as in Qwen2.
    """

    def forward(self, x: torch.Tensor | None) -> torch.Tensor:
        """Normalise ``x`` [..., hidden_size]; the result has the same shape. None returns the weight, as ``NormWeight`` does."""
        if x is None:
            return self.weight
        if self.kernels is EAGER and platform.has_gpu():
            # On GPUs torch's own kernel does this in one launch.
            return torch_rms_norm(x, self.weight, self.eps)
        return rms_norm(x, self.weight, self.eps, self.kernels)


class NormWeight(_Norm):
    """The weight of a norm that its owner computes together with other norms.

    Callers call this module for its weight instead of reading the attribute: overlapped parameter gathering waits for weights
    in hooks on calls.
    """

    def forward(self) -> torch.Tensor:
        """Return the weight [hidden_size]."""
        return self.weight
