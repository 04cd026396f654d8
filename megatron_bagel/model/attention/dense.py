# SPDX-License-Identifier: Apache-2.0
"""The reference backend of the tests: one dense mask over all tokens, quadratic in the length of the pack."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.platform.device import to_device


class DensePlan:
    """Softmax attention under the full boolean mask [s, keys]."""

    def __init__(self, mask: PackMask, order: TokenOrder, device: torch.device | str = "cpu", keys: TokenOrder | None = None) -> None:
        self.mask = to_device(torch.from_numpy(mask.allowed(order.positions, (keys or order).positions)), device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """Compute attention as ``AttentionPlan.attend`` describes; every layer does the same."""
        repeat = q.shape[1] // k.shape[1]
        q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
        scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weights = F.softmax(scores.masked_fill(~self.mask, float("-inf")), dim=-1).to(v.dtype)
        return (weights @ v).transpose(0, 1).flatten(1)
