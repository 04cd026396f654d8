"""Attention by torch's FlexAttention: on GPUs one compiled kernel skips every empty block of the pack's mask.

The block mask comes from the segments (layout/blocks.py), one head broadcast to all. FlexAttention has no backward pass on
CPUs, so there it serves only to be compared with the oracle.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from megatron_bagel.layout.blocks import block_occupancy
from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder

BLOCK = 128


@functools.cache
def _kernel(compiled: bool):
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _ordered(blocks: np.ndarray, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """FlexAttention's form of a boolean block matrix: counts [1, 1, rows] and column numbers, present ones first [1, 1, rows, cols]."""
    counts = torch.from_numpy(blocks.sum(1).astype(np.int32)).to(device)
    columns = torch.from_numpy(np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)).to(device)
    return counts[None, None], columns[None, None]


def block_mask(mask: PackMask, order: TokenOrder, device: torch.device | str) -> BlockMask:
    """BlockMask over the rank's slots, padding included."""
    occupancy = block_occupancy(mask, order, block=BLOCK)
    padding = order.length - len(order.positions)

    def per_slot(values: np.ndarray, fill: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([values[order.positions], np.full(padding, fill)])).to(device)

    position = per_slot(np.arange(mask.length), -1)
    sample, split = per_slot(mask.token_samples(), -1), per_slot(mask.token_splits(), -1)
    # Plain booleans: a compiled mask function would take a comparison with an enum for a constant.
    modes = np.repeat(mask.split_modes, mask.split_lens)
    causal, noise = per_slot(modes == Mode.CAUSAL, True), per_slot(modes == Mode.NOISE, False)

    def allowed(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        same = split[q] == split[k]
        visible = (position[k] <= position[q]) | (same & ~causal[k])
        return (sample[q] == sample[k]) & (sample[q] >= 0) & visible & (~noise[k] | same)

    partial = _ordered(occupancy.some & ~occupancy.full, device)
    full = _ordered(occupancy.full, device)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(order.length, order.length))


class FlexPlan:
    """One block mask per pack, shared by all layers and heads."""

    def __init__(self, mask: PackMask, order: TokenOrder, device: torch.device | str = "cpu") -> None:
        self.real, self.length = len(order.positions), order.length
        self.mask = block_mask(mask, order, device)
        self.kernel = _kernel(torch.device(device).type == "cuda")

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """See AttentionPlan; the same in every layer."""
        missing = self.length - self.real
        if missing:
            q, k, v = (torch.cat([x, x.new_zeros((missing, *x.shape[1:]))]) for x in (q, k, v))
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = self.kernel(q, k, v, block_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1).flatten(1)[: self.real]
