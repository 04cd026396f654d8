# SPDX-License-Identifier: Apache-2.0
"""The slots of interleaved samples: interleaved_plan.py as arrays, with the same draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.planner.slots import CLEAN_SLOT, NOISED_FRAME, NOISED_SLOT, TEXT_SLOT, VIT_SLOT, Batch, Slots
from megatron_bagel.data.sources.stored_items import COUNT, DROP, DROP_VIT, FIELDS, FLAGS, IMAGE, KIND, LOSS, NEVER, TEXT, VAE, VIT


@dataclass(frozen=True)
class _Items:
    """All items of the batch, one after the other: their row in it, their number in the sample, and their fields [items, FIELDS]."""

    row: np.ndarray
    number: np.ndarray
    fields: np.ndarray

    def earlier(self, counts: np.ndarray) -> np.ndarray:
        """Return the sum of ``counts`` [items] over the earlier items of each item's sample."""
        sums = np.cumsum(counts) - counts
        return sums - sums[np.arange(len(counts)) - self.number] if len(counts) else sums


def interleaved_slots(batch: Batch) -> Slots:
    """Return the slots of interleaved samples: per image its noised, clean and ViT copy, as far as it has them."""
    items = _items_of(batch)
    is_text = items.fields[:, KIND] == TEXT
    counts, flags = items.fields[:, COUNT], items.fields[:, FLAGS]
    copies = np.stack([np.where(is_text | (flags & flag == 0), 0, counts) for flag in (LOSS, VAE, VIT)])
    num_slots = np.where(is_text, 1, copies.sum(axis=0))
    first_slots = items.earlier(num_slots)
    width = int((first_slots + num_slots).max(initial=0))
    slots = Slots(len(batch.rows), width)
    drop = np.full((len(batch.rows), width), NEVER, dtype=np.int64)
    _set_texts(batch, items, is_text, first_slots, slots, drop)
    _set_images(batch, items, copies, first_slots, slots, drop)
    slots.drop = drop
    return slots


def _items_of(batch: Batch) -> _Items:
    structure = batch.shard.structure
    counts = batch.counts(structure) // FIELDS
    row = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    positions = (batch.starts(structure)[row] + number * FIELDS)[:, None] + np.arange(FIELDS)
    return _Items(row, number, structure.values[positions].astype(np.int64))


def _set_texts(batch: Batch, items: _Items, is_text: np.ndarray, first_slots: np.ndarray, slots: Slots, drop: np.ndarray) -> None:
    alternatives = np.where(is_text, items.fields[:, COUNT], 0)
    texts = batch.starts(batch.shard.text_tokens)[items.row] + items.earlier(alternatives)
    has_choice = alternatives > 1
    for number in np.unique(items.number[has_choice]).tolist():
        chosen = np.flatnonzero(has_choice & (items.number == number))
        texts[chosen] += batch.selected(items.row[chosen]).integers(alternatives[chosen], f"alternative{number}")
    row, slot = items.row[is_text], first_slots[is_text]
    slots.kind[row, slot] = TEXT_SLOT
    slots.length[row, slot] = batch.shard.text_tokens.values[texts[is_text]]
    drop[row, slot] = items.fields[is_text, DROP]


def _set_images(batch: Batch, items: _Items, copies: np.ndarray, first_slots: np.ndarray, slots: Slots, drop: np.ndarray) -> None:
    frames = np.where(items.fields[:, KIND] == IMAGE, items.fields[:, COUNT], 0)
    first_images = batch.starts(batch.shard.width)[items.row] + items.earlier(frames)
    image_counts = batch.counts(batch.shard.width)
    kinds = ("vae", NOISED_SLOT, None), ("vae", CLEAN_SLOT, DROP), ("vit", VIT_SLOT, DROP_VIT)
    offset = np.zeros(len(first_slots), dtype=np.int64)
    for (kind, slot_kind, drop_field), count in zip(kinds, copies, strict=True):
        item = np.repeat(np.arange(len(count)), count)  # the item of every copy of every frame
        frame = np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)
        row, slot = items.row[item], (first_slots + offset)[item] + frame
        is_clip = count[item] > 1
        slots.kind[row, slot] = np.where(is_clip, NOISED_FRAME, slot_kind) if slot_kind == NOISED_SLOT else slot_kind
        if len(item):
            slots.length[row, slot] = batch.image_tokens(kind, first_images[item] + frame, image_counts[row])
        if drop_field is not None:
            drop[row, slot] = items.fields[item, drop_field]
        if is_clip.any():
            if slots.continues is None:
                slots.continues = np.zeros(slots.kind.shape, dtype=bool)
            slots.continues[row, slot] = frame > 0
        offset += count
