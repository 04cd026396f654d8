# SPDX-License-Identifier: Apache-2.0
"""Attention with the kernel of MagiAttention (the package ``magi_attention``), which takes the mask as rectangles instead of blocks.

Facts about ``flex_flash_attn_func`` come from its source at version 1.1.1 (https://github.com/SandAI-org/MagiAttention,
``magi_attention/functional/flex_flash_attn.py``). It takes queries [tokens, heads, d], keys and values [tokens, KV heads, d] in fp16 or
bf16, where the KV heads divide the heads, and ranges and shapes as int32 on the GPU. Ranges of queries and of keys may overlap, and a pair
counts as often as rectangles hold it. Atomic additions make the last bits differ from run to run unless ``deterministic`` is set. It
returns the output [tokens, heads, d] and the logarithms of the softmax sums. MagiAttention's own context parallelism is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.rectangles import mask_rectangles
from megatron_bagel.platform.device import to_device


def _kernel() -> Callable[..., Any]:
    from magi_attention.functional import flex_flash_attn_func

    kernel: Callable[..., Any] = flex_flash_attn_func
    return kernel


class MagiPlan:
    """One list of rectangles per pack for all layers and heads.

    The kernel reads the slots in expert-sorted order, as the layers hold them. In the order of the sequence a pack has fewer rectangles
    (``benchmarks.layout`` counts both), but every layer would copy queries, keys, values and results. ``keys`` are those of all ranks.
    """

    def __init__(self, mask: PackMask, order: TokenOrder, device: torch.device | str = "cpu", keys: TokenOrder | None = None) -> None:
        """Lay out the rectangles. Raises ImportError without the package."""
        self.kernel = _kernel()
        rectangles = mask_rectangles(mask, order, keys)
        self.q_ranges = to_device(torch.from_numpy(rectangles.queries), device)
        self.k_ranges = to_device(torch.from_numpy(rectangles.keys), device)
        self.shapes = to_device(torch.from_numpy(rectangles.shapes), device)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """Compute attention as ``AttentionPlan.attend`` describes; every layer does the same."""
        if not len(q):
            # Without queries, keys and values stay in the graph so that their weights get (zero) gradients.
            return q.flatten(1) + (k.sum() + v.sum())
        deterministic = torch.are_deterministic_algorithms_enabled()
        output = self.kernel(q, k, v, self.q_ranges, self.k_ranges, self.shapes, deterministic=deterministic)[0]
        return output.flatten(1)
