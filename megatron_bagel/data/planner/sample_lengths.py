# SPDX-License-Identifier: Apache-2.0
"""Lengths and costs of many samples at once, as arrays: ten million samples cannot afford an object for each.

The functions repeat ``sample_plan`` choice by choice with the same keyed draws, and a test holds both equal. A batch of samples is a
table of slots [samples, slots]: slot j is the j-th item of each sample, with its kind and its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.index.columns import PlanningColumns, Ragged
from megatron_bagel.data.keyed_random import keyed_integers, keyed_uniform
from megatron_bagel.data.planner.cost_model import COST_UNIT
from megatron_bagel.data.planner.sample_plan import JOIN_PROBABILITY, MAX_CHAIN, PlanSettings, transform_of
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, VLM, GroupConfig
from megatron_bagel.data.sources.records import CONTINUED, ENDED, IMAGE_ITEM, PLAIN
from megatron_bagel.data.transforms import output_sizes

_ABSENT, _TEXT, _VIT, _CLEAN, _NOISED = range(5)  # kinds of slots


@dataclass(frozen=True)
class _Batch:
    """The rows being measured: row numbers in their shard (or in concatenated columns), and the key of their draws."""

    shard: PlanningColumns
    rows: np.ndarray
    dataset: str
    indexes: np.ndarray
    epoch: int
    group: GroupConfig
    settings: PlanSettings

    def integers(self, high: np.ndarray, choice_name: str) -> np.ndarray:
        return keyed_integers(high, self.settings.seed, self.dataset, self.indexes, self.epoch, choice_name)

    def is_below(self, probability: float, choice_name: str) -> np.ndarray:
        return np.less(keyed_uniform(self.settings.seed, self.dataset, self.indexes, self.epoch, choice_name), probability)

    def starts(self, column: Ragged) -> np.ndarray:
        return column.offsets[self.rows].astype(np.int64)

    def counts(self, column: Ragged) -> np.ndarray:
        return column.offsets[self.rows + 1].astype(np.int64) - self.starts(column)

    def image_tokens(self, kind: str, images: np.ndarray, img_nums: np.ndarray | int = 1) -> np.ndarray:
        """Return the tokens, without border tokens, of images given by their index in the shard's image columns."""
        width, height = output_sizes(
            transform_of(self.group, kind), self.shard.width.values[images], self.shard.height.values[images], img_nums
        )
        stride = self.settings.layout.vit_patch if kind == "vit" else self.settings.layout.vae_downsample
        return (width // stride) * (height // stride)


class _Slots:
    """The table under construction; lengths exclude border tokens."""

    def __init__(self, samples: int, slots: int) -> None:
        self.kind = np.zeros((samples, slots), dtype=np.int8)
        self.length = np.zeros((samples, slots), dtype=np.int64)

    def set_slot(self, slot: int, kind: int, length: np.ndarray, selection: np.ndarray | None = None) -> None:
        mask = np.ones(len(self.kind), dtype=bool) if selection is None else selection
        self.kind[mask, slot] = kind
        self.length[mask, slot] = length[mask]


def measure_rows(
    shard: PlanningColumns, rows: np.ndarray, dataset: str, indexes: np.ndarray, epoch: int, group: GroupConfig, settings: PlanSettings
) -> np.ndarray:
    """Return (tokens, full_tokens, cost) [3, n] of ``rows`` of the columns, as in ``cost_model.Measures``.

    ``indexes`` are their rows in ``dataset``.
    """
    batch = _Batch(shard, rows, dataset, indexes, epoch, group, settings)
    slots = {T2I: _t2i, EDIT: _edit}.get(group.name, _turns)(batch)
    if not settings.visual_und:
        slots.kind[slots.kind == _VIT] = _ABSENT
    dropped = _dropped(batch, slots) if group.makes_images else np.zeros(slots.kind.shape, dtype=bool)
    return _totals(slots, dropped, settings)


def _t2i(batch: _Batch) -> _Slots:
    slots = _Slots(len(batch.rows), 2)
    caption = batch.integers(batch.counts(batch.shard.text_tokens), "caption")
    slots.set_slot(0, _TEXT, batch.shard.text_tokens.values[batch.starts(batch.shard.text_tokens) + caption])
    slots.set_slot(1, _NOISED, batch.image_tokens("vae", batch.starts(batch.shard.width)))
    return slots


def _edit(batch: _Batch) -> _Slots:
    """Fill the slots [vae vit text noised] and, for two steps that are not joined, four more of the same kinds."""
    slots = _Slots(len(batch.rows), 8)
    images, first_image = batch.counts(batch.shard.width), batch.starts(batch.shard.width)
    start = batch.integers(images - 1, "start")
    end = start + 1 + batch.integers(np.minimum(start + MAX_CHAIN, images) - start - 1, "end")
    joined = (end - start > 1) & batch.is_below(JOIN_PROBABILITY, "join")
    end = np.where(joined & (end == images - 1), end - 1, end)
    has_second_step = end - start > 1
    text = np.where(joined, _instruction(batch, start, 0, ENDED, joined), _instruction(batch, start, 0, PLAIN, ~joined))
    text = text + _instruction(batch, start, 1, CONTINUED, joined & has_second_step)
    slots.set_slot(0, _CLEAN, batch.image_tokens("vae", first_image + start))
    slots.set_slot(1, _VIT, batch.image_tokens("vit", first_image + start))
    slots.set_slot(2, _TEXT, text)
    slots.set_slot(3, _NOISED, batch.image_tokens("vae", first_image + np.where(joined, end, start + 1)))
    is_second_step, middle_image = has_second_step & ~joined, first_image + start + 1
    slots.set_slot(4, _CLEAN, batch.image_tokens("vae", middle_image), is_second_step)
    slots.set_slot(5, _VIT, batch.image_tokens("vit", middle_image), is_second_step)
    slots.set_slot(6, _TEXT, _instruction(batch, start, 1, PLAIN, is_second_step), is_second_step)
    slots.set_slot(7, _NOISED, batch.image_tokens("vae", first_image + end), is_second_step)
    return slots


def _instruction(batch: _Batch, start: np.ndarray, step: int, form: int, selection: np.ndarray) -> np.ndarray:
    """Return the tokens of the drawn instruction of a chain's ``step`` in one form; 0 outside ``selection``."""
    tokens = np.zeros(len(batch.rows), dtype=np.int64)
    if not selection.any():
        return tokens
    selected = _Batch(batch.shard, batch.rows[selection], batch.dataset, batch.indexes[selection], batch.epoch, batch.group, batch.settings)
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


def _turns(batch: _Batch) -> _Slots:
    """Fill the slots with the items of a conversation or a text, in stored order."""
    items = batch.counts(batch.shard.structure)
    slots = _Slots(len(batch.rows), int(items.max(initial=0)))
    first_position = batch.starts(batch.shard.structure)
    text, image = batch.starts(batch.shard.text_tokens), batch.starts(batch.shard.width)
    images = batch.counts(batch.shard.width)
    for slot in range(slots.kind.shape[1]):
        code = np.full(len(items), -1)
        has_slot = items > slot
        code[has_slot] = batch.shard.structure.values[first_position[has_slot] + slot]
        is_image, is_text = code == IMAGE_ITEM, has_slot & (code != IMAGE_ITEM)
        slots.kind[is_text, slot] = _TEXT
        slots.length[is_text, slot] = batch.shard.text_tokens.values[text[is_text]]
        if is_image.any():
            slots.kind[is_image, slot] = _VIT
            img_nums = images[is_image] if batch.group.name == VLM else 1
            slots.length[is_image, slot] = batch.image_tokens("vit", image[is_image], img_nums)
        text, image = text + is_text, image + is_image
    return slots


def _dropped(batch: _Batch, slots: _Slots) -> np.ndarray:
    """Return the conditions that dropout removes, [samples, slots]. A slot is an item's position in the plan, which keys its draw."""
    dropout = batch.settings.dropout
    dropped = np.zeros(slots.kind.shape, dtype=bool)
    for slot in range(slots.kind.shape[1]):
        for kind, probability in ((_TEXT, dropout.text), (_CLEAN, dropout.vae), (_VIT, dropout.vit)):
            is_kind = slots.kind[:, slot] == kind
            if is_kind.any() and probability > 0:
                dropped[:, slot] |= is_kind & batch.is_below(probability, f"drop{slot}")
    return dropped


def _totals(slots: _Slots, dropped: np.ndarray, settings: PlanSettings) -> np.ndarray:
    """Sum the slots; the mask area grows item by item, by the rule of ``layout/mask.py``."""
    samples, count = slots.kind.shape
    tokens, full_tokens, area, visible_tokens, vit, vae = (np.zeros(samples, dtype=np.int64) for _ in range(6))
    for slot in range(count):
        kind = slots.kind[:, slot]
        full_length = np.where(kind == _ABSENT, 0, slots.length[:, slot] + 2)
        length = np.where(dropped[:, slot], 0, full_length)
        full_tokens += full_length
        tokens += length
        area += length * visible_tokens + np.where(kind == _TEXT, length * (length + 1) // 2, length * length)
        visible_tokens += np.where(kind == _NOISED, 0, length)
        vit += np.where(kind == _VIT, length, 0)
        vae += np.where((kind == _CLEAN) | (kind == _NOISED), length, 0)
    costs = settings.costs
    work = tokens + costs.pair * area + costs.vit_token * vit + costs.vae_token * vae
    return np.stack([tokens, full_tokens, np.rint(work * COST_UNIT).astype(np.int64)])
