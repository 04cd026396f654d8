# SPDX-License-Identifier: Apache-2.0
"""Attention with torch's FlexAttention: on GPUs one compiled kernel skips every empty block of the pack's mask.

The block mask comes from the segments (``layout/blocks.py``); one mask serves all heads. FlexAttention has no backward pass on
CPUs, where this backend only serves for comparison with the dense one. ``FlexFlashPlan`` asks for FlashAttention-4's kernel of the same
mask, which is faster on Hopper and Blackwell.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_bagel import platform
from megatron_bagel.layout.blocks import block_occupancy
from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.platform.device import to_device

BLOCK = 128


@functools.cache
def _kernel(compiled: bool) -> Callable[..., Any]:
    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if compiled else kernel


def _padded_columns(blocks: np.ndarray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FlexAttention's form of a boolean block matrix.

    The result is the count of present columns per row [1, 1, rows], and the column numbers, present ones first
    [1, 1, rows, cols].
    """
    counts = to_device(torch.from_numpy(blocks.sum(1).astype(np.int32)), device)
    columns = to_device(torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)), device)
    return counts[None, None], columns[None, None]


@dataclass(frozen=True)
class _SlotTensors:
    """The properties of each slot that the mask rule compares, all [slots]. Padding has sample -1."""

    position: torch.Tensor
    sample: torch.Tensor
    split: torch.Tensor
    causal: torch.Tensor
    noise: torch.Tensor

    @staticmethod
    def of(mask: PackMask, order: TokenOrder, device: torch.device | str) -> _SlotTensors:
        padding = order.length - len(order.positions)

        def per_slot(values: np.ndarray, fill: int) -> torch.Tensor:
            return to_device(torch.from_numpy(np.concatenate([values[order.positions], np.full(padding, fill)])), device)

        # These are plain booleans because a compiled mask function would treat a comparison with an enum as a constant.
        modes = np.repeat(mask.split_modes, mask.split_lens)
        return _SlotTensors(
            position=per_slot(np.arange(mask.length), -1),
            sample=per_slot(mask.token_samples(), -1),
            split=per_slot(mask.token_splits(), -1),
            causal=per_slot(modes == Mode.CAUSAL, True),
            noise=per_slot(modes == Mode.NOISE, False),
        )


def block_mask(mask: PackMask, order: TokenOrder, device: torch.device | str, keys: TokenOrder | None = None) -> BlockMask:
    """Return the BlockMask from the rank's slots to those of ``keys`` (default: the same slots), padding included."""
    occupancy = block_occupancy(mask, order, keys, BLOCK)
    query_slots = _SlotTensors.of(mask, order, device)
    key_slots = query_slots if keys is None else _SlotTensors.of(mask, keys, device)
    # The compiler accepts tensors in a mask function's closure, but not fields of objects in it.
    q_position, q_sample, q_split = query_slots.position, query_slots.sample, query_slots.split
    k_position, k_sample, k_split = key_slots.position, key_slots.sample, key_slots.split
    causal, noise = key_slots.causal, key_slots.noise

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        same_split = q_split[q] == k_split[k]
        visible = (k_position[k] <= q_position[q]) | (same_split & ~causal[k])
        return (q_sample[q] == k_sample[k]) & (q_sample[q] >= 0) & visible & (~noise[k] | same_split)

    partial_blocks = _padded_columns(occupancy.occupied & ~occupancy.full_blocks, device)
    full_blocks = _padded_columns(occupancy.full_blocks, device)
    lengths = (order.length, (keys or order).length)
    return BlockMask.from_kv_blocks(*partial_blocks, *full_blocks, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=lengths)


class FlexPlan:
    """One block mask per pack for all layers and heads. The keys of other ranks (``keys``) come without padding."""

    def __init__(self, mask: PackMask, order: TokenOrder, device: torch.device | str = "cpu", keys: TokenOrder | None = None) -> None:
        self.real_rows, self.padding = len(order.positions), order.length - len(order.positions)
        self.key_padding = self.padding if keys is None else keys.length - len(keys.positions)
        self.mask = block_mask(mask, order, device, keys)
        self.kernel = _kernel(platform.compiles_kernels(device))

    def _kernel_options(self) -> dict[str, Any] | None:
        """Return FlexAttention's options of the kernel; None leaves the choice to torch."""
        return None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """Compute attention as ``AttentionPlan.attend`` describes; every layer does the same."""
        q, k, v = _padded(q, self.padding), _padded(k, self.key_padding), _padded(v, self.key_padding)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        grouped, options = q.shape[1] != k.shape[1], self._kernel_options()
        output = self.kernel(q, k, v, block_mask=self.mask, enable_gqa=grouped, kernel_options=options)
        return output[0].transpose(0, 1).flatten(1)[: self.real_rows]


class FlexFlashPlan(FlexPlan):
    """FlexAttention on the kernel of FlashAttention-4 (the package flash-attn-4). Other kernels of torch do not stand in for it."""

    def _kernel_options(self) -> dict[str, Any] | None:
        return {"BACKEND": "FLASH"}


def _padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([x, x.new_zeros((rows, *x.shape[1:]))]) if rows else x
