"""RMSNorm that works under sequence parallelism: Megatron-Core's wrapper of torch's refuses it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel import platform
from megatron_bagel.model.fused import rms_norm


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension.

    Statistics in fp32; the weight multiplies after the cast back to the input's dtype, as Qwen2 does it.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, sequence_parallel: bool | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron sums gradients of marked parameters over the tensor-parallel ranks, each of which saw some tokens only.
        self.weight.sequence_parallel = config.sequence_parallel if sequence_parallel is None else sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [..., hidden_size], same shape out."""
        if platform.has_gpu():
            # torch's own kernel does this in one launch there.
            return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight
        return rms_norm(x, self.weight, self.eps)


class NormWeight(RMSNorm):
    """A norm that its owner computes together with others. It is called for its weight, not read, because overlapped parameter
    gathering waits for weights in hooks on calls."""

    def forward(self) -> torch.Tensor:
        return self.weight
