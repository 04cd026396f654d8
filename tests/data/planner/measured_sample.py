# SPDX-License-Identifier: Apache-2.0
"""The measures of one sample, item by item: what the planner's arrays must hold."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_bagel.data.planner.cost_model import COST_UNIT, CostModel
from megatron_bagel.layout.items import Item, Mode, Sample
from megatron_bagel.layout.pack import LayoutSpec, item_grid, item_tokens, split_mode


def measure_sample(sample: Sample, spec: LayoutSpec, costs: CostModel) -> tuple[int, int, int]:
    """Return (tokens, full_tokens, cost) of one sample, as in ``Measures``."""
    tokens = full_tokens = vit = vae = 0
    for item in sample.items:
        length = _undropped_tokens(item, spec)
        full_tokens += length
        if item.dropped:
            continue
        tokens += length
        vit += length * (item.kind == "vit")
        vae += length * (item.kind == "vae")
    work = tokens + costs.pair * mask_area(sample.items, spec) + costs.vit_token * vit + costs.vae_token * vae
    return tokens, full_tokens, round(work * COST_UNIT)


def _undropped_tokens(item: Item, spec: LayoutSpec) -> int:
    if not item.dropped:
        return item_tokens(item, spec)
    if item.kind == "text":
        return len(item.token_ids) + 2
    rows, cols = item_grid(item, spec)
    return rows * cols + 2


def mask_area(items: Iterable[Item], spec: LayoutSpec) -> int:
    """Return the (query, key) pairs that attention computes in one sample, by the rule of ``layout/mask.py``."""
    area = visible_tokens = split_tokens = 0
    mode = Mode.CAUSAL
    for item in items:
        if item.dropped:
            continue
        if item.split_start:
            split_tokens, mode = 0, split_mode(item)
        split_tokens += item_tokens(item, spec)
        if item.split_end:
            split_area = split_tokens * (split_tokens + 1) // 2 if mode == Mode.CAUSAL else split_tokens * split_tokens
            area += split_tokens * visible_tokens + split_area
            visible_tokens += 0 if mode == Mode.NOISE else split_tokens
    return area
