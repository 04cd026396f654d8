"""Lengths and costs of many samples at once, as arrays: planning ten million samples cannot afford an object for each.

It follows `sample_plan` choice for choice, with the same keyed draws; a test holds the two equal. A batch of samples is a table of
slots [samples, slots]: slot j is the j-th item of each sample, with its kind and its length.
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
class _Rows:
    """The rows being measured: places in their shard (or in gathered columns), and the key of their draws."""

    shard: PlanningColumns
    rows: np.ndarray
    dataset: str
    indexes: np.ndarray
    epoch: int
    group: GroupConfig
    settings: PlanSettings

    def integers(self, high: np.ndarray, what: str) -> np.ndarray:
        return keyed_integers(high, self.settings.seed, self.dataset, self.indexes, self.epoch, what)

    def below(self, probability: float, what: str) -> np.ndarray:
        return keyed_uniform(self.settings.seed, self.dataset, self.indexes, self.epoch, what) < probability

    def starts(self, column: Ragged) -> np.ndarray:
        return column.offsets[self.rows].astype(np.int64)

    def counts(self, column: Ragged) -> np.ndarray:
        return column.offsets[self.rows + 1].astype(np.int64) - self.starts(column)

    def image_tokens(self, kind: str, images: np.ndarray, img_nums: np.ndarray | int = 1) -> np.ndarray:
        """Tokens without border tokens of stored images, given by their places in the shard's image columns."""
        width, height = output_sizes(
            transform_of(self.group, kind), self.shard.width.values[images], self.shard.height.values[images], img_nums
        )
        stride = self.settings.layout.vit_patch if kind == "vit" else self.settings.layout.vae_downsample
        return (width // stride) * (height // stride)


class _Slots:
    """The table under construction; lengths are without border tokens."""

    def __init__(self, samples: int, slots: int) -> None:
        self.kind = np.zeros((samples, slots), dtype=np.int8)
        self.length = np.zeros((samples, slots), dtype=np.int64)

    def put(self, slot: int, kind: int, length: np.ndarray, where: np.ndarray | None = None) -> None:
        mask = np.ones(len(self.kind), dtype=bool) if where is None else where
        self.kind[mask, slot] = kind
        self.length[mask, slot] = length[mask]


def measure_rows(
    shard: PlanningColumns, rows: np.ndarray, dataset: str, indexes: np.ndarray, epoch: int, group: GroupConfig, settings: PlanSettings
) -> np.ndarray:
    """(tokens, full_tokens, cost) [3, n] of ``rows`` of the columns, as in `counts.Measures`; ``indexes`` are their rows in ``dataset``."""
    batch = _Rows(shard, rows, dataset, indexes, epoch, group, settings)
    slots = {T2I: _t2i, EDIT: _edit}.get(group.name, _turns)(batch)
    if not settings.visual_und:
        slots.kind[slots.kind == _VIT] = _ABSENT
    dropped = _dropped(batch, slots) if group.makes_images else np.zeros(slots.kind.shape, dtype=bool)
    return _totals(slots, dropped, settings)


def _t2i(batch: _Rows) -> _Slots:
    slots = _Slots(len(batch.rows), 2)
    caption = batch.integers(batch.counts(batch.shard.text_tokens), "caption")
    slots.put(0, _TEXT, batch.shard.text_tokens.values[batch.starts(batch.shard.text_tokens) + caption])
    slots.put(1, _NOISED, batch.image_tokens("vae", batch.starts(batch.shard.width)))
    return slots


def _edit(batch: _Rows) -> _Slots:
    """[vae vit text noised] and, for two steps that are not joined, the same again."""
    slots = _Slots(len(batch.rows), 8)
    images, first_image = batch.counts(batch.shard.width), batch.starts(batch.shard.width)
    start = batch.integers(images - 1, "start")
    end = start + 1 + batch.integers(np.minimum(start + MAX_CHAIN, images) - start - 1, "end")
    joined = (end - start > 1) & batch.below(JOIN_PROBABILITY, "join")
    end = np.where(joined & (end == images - 1), end - 1, end)
    second = end - start > 1
    text = np.where(joined, _instruction(batch, start, 0, ENDED, joined), _instruction(batch, start, 0, PLAIN, ~joined))
    text = text + _instruction(batch, start, 1, CONTINUED, joined & second)
    slots.put(0, _CLEAN, batch.image_tokens("vae", first_image + start))
    slots.put(1, _VIT, batch.image_tokens("vit", first_image + start))
    slots.put(2, _TEXT, text)
    slots.put(3, _NOISED, batch.image_tokens("vae", first_image + np.where(joined, end, start + 1)))
    again, middle = second & ~joined, first_image + start + 1
    slots.put(4, _CLEAN, batch.image_tokens("vae", middle), again)
    slots.put(5, _VIT, batch.image_tokens("vit", middle), again)
    slots.put(6, _TEXT, _instruction(batch, start, 1, PLAIN, again), again)
    slots.put(7, _NOISED, batch.image_tokens("vae", first_image + end), again)
    return slots


def _instruction(batch: _Rows, start: np.ndarray, step: int, form: int, where: np.ndarray) -> np.ndarray:
    """Tokens of the drawn instruction of a chain's ``step`` in one form; 0 outside ``where``."""
    tokens = np.zeros(len(batch.rows), dtype=np.int64)
    if not where.any():
        return tokens
    part = _Rows(batch.shard, batch.rows[where], batch.dataset, batch.indexes[where], batch.epoch, batch.group, batch.settings)
    steps, sums, first = part.shard.structure, part.shard.structure_sums, part.starts(part.shard.structure)
    place = first + start[where] + step
    alternative = part.integers(steps.values[place].astype(np.int64), f"instruction{step}")
    forms = np.where(part.counts(part.shard.width) > 2, 3, 1)  # records.forms_per_instruction
    text = (sums[place] - sums[first] + alternative) * forms + form
    tokens[where] = part.shard.text_tokens.values[part.starts(part.shard.text_tokens) + text]
    return tokens


def _turns(batch: _Rows) -> _Slots:
    """The items of a conversation or a text, in stored order."""
    items = batch.counts(batch.shard.structure)
    slots = _Slots(len(batch.rows), int(items.max(initial=0)))
    first = batch.starts(batch.shard.structure)
    text, image = batch.starts(batch.shard.text_tokens), batch.starts(batch.shard.width)
    images = batch.counts(batch.shard.width)
    for slot in range(slots.kind.shape[1]):
        code = np.full(len(items), -1)
        there = items > slot
        code[there] = batch.shard.structure.values[first[there] + slot]
        is_image, is_text = code == IMAGE_ITEM, there & (code != IMAGE_ITEM)
        slots.kind[is_text, slot] = _TEXT
        slots.length[is_text, slot] = batch.shard.text_tokens.values[text[is_text]]
        if is_image.any():
            slots.kind[is_image, slot] = _VIT
            img_nums = images[is_image] if batch.group.name == VLM else 1
            slots.length[is_image, slot] = batch.image_tokens("vit", image[is_image], img_nums)
        text, image = text + is_text, image + is_image
    return slots


def _dropped(batch: _Rows, slots: _Slots) -> np.ndarray:
    """Conditions that dropout removes [samples, slots]; a slot is an item's position in the plan, which names its draw."""
    dropout = batch.settings.dropout
    dropped = np.zeros(slots.kind.shape, dtype=bool)
    for slot in range(slots.kind.shape[1]):
        for kind, probability in ((_TEXT, dropout.text), (_CLEAN, dropout.vae), (_VIT, dropout.vit)):
            mine = slots.kind[:, slot] == kind
            if mine.any() and probability > 0:
                dropped[:, slot] |= mine & batch.below(probability, f"drop{slot}")
    return dropped


def _totals(slots: _Slots, dropped: np.ndarray, settings: PlanSettings) -> np.ndarray:
    """Sums over the slots; the mask area grows item by item as in `counts.mask_area`."""
    samples, count = slots.kind.shape
    tokens, full, area, seen, vit, vae = (np.zeros(samples, dtype=np.int64) for _ in range(6))
    for slot in range(count):
        kind = slots.kind[:, slot]
        whole = np.where(kind == _ABSENT, 0, slots.length[:, slot] + 2)
        length = np.where(dropped[:, slot], 0, whole)
        full += whole
        tokens += length
        area += length * seen + np.where(kind == _TEXT, length * (length + 1) // 2, length * length)
        seen += np.where(kind == _NOISED, 0, length)
        vit += np.where(kind == _VIT, length, 0)
        vae += np.where((kind == _CLEAN) | (kind == _NOISED), length, 0)
    costs = settings.costs
    work = tokens + costs.pair * area + costs.vit_token * vit + costs.vae_token * vae
    return np.stack([tokens, full, np.rint(work * COST_UNIT).astype(np.int64)])
