# SPDX-License-Identifier: Apache-2.0
"""Lengths and costs of many samples at once, as arrays: ten million samples cannot afford an object for each.

The functions repeat ``sample_plan`` choice by choice with the same keyed draws, and a test holds both equal. A batch of samples is a
table of slots [samples, slots]: slot j is the j-th item of each sample, with its kind and its length.
"""

from __future__ import annotations

import numpy as np

from megatron_bagel.data.index.columns import PlanningColumns
from megatron_bagel.data.planner.cost_model import COST_UNIT
from megatron_bagel.data.planner.interleaved_lengths import interleaved_slots
from megatron_bagel.data.planner.sample_plan import JOIN_PROBABILITY, MAX_CHAIN, PlanSettings
from megatron_bagel.data.planner.shown_frames import expanded_columns
from megatron_bagel.data.planner.slots import ABSENT, CLEAN_SLOT, NOISED_FRAME, NOISED_SLOT, TEXT_SLOT, VIT_SLOT, Batch, Slots
from megatron_bagel.data.sources.dataset_config import EDIT, INTERLEAVED, T2I, GroupConfig
from megatron_bagel.data.sources.records import CONTINUED, ENDED, IMAGE_ITEM, PLAIN
from megatron_bagel.data.sources.stored_items import BY_FLAG, OWN, own_probabilities


def measure_rows(
    shard: PlanningColumns, rows: np.ndarray, dataset: str, indexes: np.ndarray, epoch: int, group: GroupConfig, settings: PlanSettings
) -> np.ndarray:
    """Return (tokens, full_tokens, cost) [3, n] of ``rows`` of the columns, as in ``cost_model.Measures``.

    ``indexes`` are their rows in ``dataset``.
    """
    shard, rows = expanded_columns(shard, rows, group, settings.seed, dataset, indexes, epoch)
    batch = Batch(shard, rows, dataset, indexes, epoch, group, settings)
    slots = {T2I: _t2i, EDIT: _edit, INTERLEAVED: interleaved_slots}.get(group.name, _turns)(batch)
    if not settings.visual_und:
        slots.kind[slots.kind == VIT_SLOT] = ABSENT
    has_conditions = group.makes_images or group.name == INTERLEAVED
    dropped = _dropped(batch, slots) if has_conditions else np.zeros(slots.kind.shape, dtype=bool)
    return _totals(slots, dropped, settings)


def _t2i(batch: Batch) -> Slots:
    slots = Slots(len(batch.rows), 2)
    caption = batch.integers(batch.counts(batch.shard.text_tokens), "caption")
    slots.set_slot(0, TEXT_SLOT, batch.shard.text_tokens.values[batch.starts(batch.shard.text_tokens) + caption])
    slots.set_slot(1, NOISED_SLOT, batch.image_tokens("vae", batch.starts(batch.shard.width)))
    return slots


def _edit(batch: Batch) -> Slots:
    """Fill the slots [vae vit text noised] and, for two steps that are not joined, four more of the same kinds."""
    slots = Slots(len(batch.rows), 8)
    images, first_image = batch.counts(batch.shard.width), batch.starts(batch.shard.width)
    start = batch.integers(images - 1, "start")
    end = start + 1 + batch.integers(np.minimum(start + MAX_CHAIN, images) - start - 1, "end")
    joined = (end - start > 1) & batch.is_below(JOIN_PROBABILITY, "join")
    end = np.where(joined & (end == images - 1), end - 1, end)
    has_second_step = end - start > 1
    text = np.where(joined, _instruction(batch, start, 0, ENDED, joined), _instruction(batch, start, 0, PLAIN, ~joined))
    text = text + _instruction(batch, start, 1, CONTINUED, joined & has_second_step)
    slots.set_slot(0, CLEAN_SLOT, batch.image_tokens("vae", first_image + start))
    slots.set_slot(1, VIT_SLOT, batch.image_tokens("vit", first_image + start))
    slots.set_slot(2, TEXT_SLOT, text)
    slots.set_slot(3, NOISED_SLOT, batch.image_tokens("vae", first_image + np.where(joined, end, start + 1)))
    is_second_step, middle_image = has_second_step & ~joined, first_image + start + 1
    slots.set_slot(4, CLEAN_SLOT, batch.image_tokens("vae", middle_image), is_second_step)
    slots.set_slot(5, VIT_SLOT, batch.image_tokens("vit", middle_image), is_second_step)
    slots.set_slot(6, TEXT_SLOT, _instruction(batch, start, 1, PLAIN, is_second_step), is_second_step)
    slots.set_slot(7, NOISED_SLOT, batch.image_tokens("vae", first_image + end), is_second_step)
    return slots


def _instruction(batch: Batch, start: np.ndarray, step: int, form: int, selection: np.ndarray) -> np.ndarray:
    """Return the tokens of the drawn instruction of a chain's ``step`` in one form; 0 outside ``selection``."""
    tokens = np.zeros(len(batch.rows), dtype=np.int64)
    if not selection.any():
        return tokens
    selected = batch.selected(selection)
    steps, structure_sums, first_position = (
        selected.shard.structure,
        selected.shard.structure_sums,
        selected.starts(selected.shard.structure),
    )
    position = first_position + start[selection] + step
    alternative = selected.integers(steps.values[position].astype(np.int64), f"instruction{step}")
    forms = np.where(selected.counts(selected.shard.width) > 2, 3, 1)  # records.forms_per_instruction
    text = (structure_sums[position] - structure_sums[first_position] + alternative) * forms + form
    tokens[selection] = selected.shard.text_tokens.values[selected.starts(selected.shard.text_tokens) + text]
    return tokens


def _turns(batch: Batch) -> Slots:
    """Fill the slots with the items of a conversation or a text, in stored order."""
    items = batch.counts(batch.shard.structure)
    slots = Slots(len(batch.rows), int(items.max(initial=0)))
    first_position = batch.starts(batch.shard.structure)
    text, image = batch.starts(batch.shard.text_tokens), batch.starts(batch.shard.width)
    images = batch.counts(batch.shard.width)
    for slot in range(slots.kind.shape[1]):
        code = np.full(len(items), -1)
        has_slot = items > slot
        code[has_slot] = batch.shard.structure.values[first_position[has_slot] + slot]
        is_image, is_text = code == IMAGE_ITEM, has_slot & (code != IMAGE_ITEM)
        slots.kind[is_text, slot] = TEXT_SLOT
        slots.length[is_text, slot] = batch.shard.text_tokens.values[text[is_text]]
        if is_image.any():
            slots.kind[is_image, slot] = VIT_SLOT
            slots.length[is_image, slot] = batch.image_tokens("vit", image[is_image], images[is_image])
        text, image = text + is_text, image + is_image
    return slots


def _dropped(batch: Batch, slots: Slots) -> np.ndarray:
    """Return the conditions that dropout removes, [samples, slots]. A slot is an item's position in the plan, which keys its draw."""
    dropout = batch.settings.dropout
    dropped = np.zeros(slots.kind.shape, dtype=bool)
    for slot in range(slots.kind.shape[1]):
        codes = slots.drop if isinstance(slots.drop, int) else slots.drop[:, slot]
        for kind, probability in ((TEXT_SLOT, dropout.text), (CLEAN_SLOT, dropout.vae), (VIT_SLOT, dropout.vit)):
            is_kind = (slots.kind[:, slot] == kind) & (codes == BY_FLAG)
            if is_kind.any() and probability > 0:
                dropped[:, slot] |= is_kind & batch.is_below(probability, f"drop{slot}")
        if isinstance(codes, np.ndarray) and dropout.own and (has_own := codes >= OWN).any():
            dropped[:, slot] |= has_own & batch.is_below(own_probabilities(codes), f"drop{slot}")
    return dropped


def _totals(slots: Slots, dropped: np.ndarray, settings: PlanSettings) -> np.ndarray:
    """Sum the slots; the mask area grows item by item, by the rule of ``layout/mask.py``."""
    samples, count = slots.kind.shape
    tokens, full_tokens, area, visible_tokens, vit, vae, clip = (np.zeros(samples, dtype=np.int64) for _ in range(7))
    for slot in range(count):
        kind = slots.kind[:, slot]
        full_length = np.where(kind == ABSENT, 0, slots.length[:, slot] + 2)
        length = np.where(dropped[:, slot], 0, full_length)
        full_tokens += full_length
        tokens += length
        area += length * visible_tokens + np.where(kind == TEXT_SLOT, length * (length + 1) // 2, length * length)
        visible_tokens += np.where(kind == NOISED_SLOT, 0, length)
        vit += np.where(kind == VIT_SLOT, length, 0)
        vae += np.where((kind == CLEAN_SLOT) | (kind == NOISED_SLOT) | (kind == NOISED_FRAME), length, 0)
        if slots.continues is not None:  # the earlier frames of a clip see a later one, too
            clip = np.where(slots.continues[:, slot], clip, 0)
            area += length * clip
            clip += length
    costs = settings.costs
    work = tokens + costs.pair * area + costs.vit_token * vit + costs.vae_token * vae
    return np.stack([tokens, full_tokens, np.rint(work * COST_UNIT).astype(np.int64)])
