"""Tensor-parallel linears that do not communicate: the layer gathers and reduces once for both experts together.

Megatron-Core's ColumnParallelLinear and RowParallelLinear would talk once per expert. Their weights, initialisation,
partition marks and sharded state are used; only the product is done here.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_bagel.model.fused import linear


class NoCommColumnLinear(ColumnParallelLinear):
    """[s, in] -> [s, out / tp]; the input is already whole on every tensor-parallel rank."""

    def forward(self, input_: torch.Tensor, *_: Any) -> torch.Tensor:
        return linear(input_, self.weight, self.bias)


class NoCommRowLinear(RowParallelLinear):
    """[s, in / tp] -> [s, out], a partial sum that the layer reduces later."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        return linear(input_, self.weight)
