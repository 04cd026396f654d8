# SPDX-License-Identifier: Apache-2.0
"""Tensor-parallel linears that do not communicate, because the layer gathers and reduces once for both experts together.

Megatron-Core's ``ColumnParallelLinear`` and ``RowParallelLinear`` would communicate once per expert. These classes keep their
weights, initialisation, partition marks and sharded state, and replace only the product.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_bagel.model.fused import linear


class NoCommColumnLinear(ColumnParallelLinear):
    """Map [s, in] to [s, out / tp]. Every tensor-parallel rank already holds the full input."""

    def forward(self, input_: torch.Tensor, *_: Any) -> torch.Tensor:
        """Map rows [s, in] to this rank's share [s, out / tp]."""
        return linear(input_, self.weight, self.bias)


class NoCommRowLinear(RowParallelLinear):
    """Map [s, in / tp] to [s, out], a partial sum that the layer reduces later."""

    def forward(self, input_: torch.Tensor) -> torch.Tensor:
        """Map rows [s, in / tp] to a partial sum [s, out]."""
        return linear(input_, self.weight)
