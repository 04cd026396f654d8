# SPDX-License-Identifier: Apache-2.0
"""The plan of an interleaved sample: its items as they are stored.

A drawn picture is followed by the clean copies that later items see.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_bagel.data.planner.planned_item import Draws, PlannedItem
from megatron_bagel.data.sources.records import Record
from megatron_bagel.data.sources.stored_items import LOSS, NEVER, TEXT, VAE, VIT, StoredItem, own_probability, stored_items


def interleaved_items(record: Record, draws: Draws) -> list[PlannedItem]:
    """Return the items of a sample in sequence order, before dropout."""
    items: list[PlannedItem] = []
    text = image = 0
    for number, stored in enumerate(stored_items(record.structure)):
        if stored.kind == TEXT:
            alternative = draws.choice(stored.count, f"alternative{number}") if stored.count > 1 else 0
            item = PlannedItem("text", loss=stored.has(LOSS), texts=(text + alternative,), next_token=stored.next_token)
            items.append(_droppable(item, stored.drop))
            text += stored.count
        else:
            copies = _copies(stored, image)
            items += [*copies[:-1], replace(copies[-1], next_token=stored.next_token)]
            image += stored.count
    return items


def _copies(stored: StoredItem, image: int) -> list[PlannedItem]:
    """Return the noised copy of an image, its clean copy and its ViT copy, as far as it has them; each of all frames of a clip."""
    items = []
    for flag, kind, drop in ((LOSS, "vae", NEVER), (VAE, "vae", stored.drop), (VIT, "vit", stored.drop_vit)):
        for frame in range(stored.count if stored.has(flag) else 0):
            is_last = frame == stored.count - 1
            item = PlannedItem(
                kind, loss=flag == LOSS, image=image + frame, split_start=frame == 0, split_end=is_last,
                frame_delta=None if is_last else stored.frame_delta,
            )  # fmt: skip
            items.append(_droppable(item, drop))
    return items


def _droppable(item: PlannedItem, code: int) -> PlannedItem:
    return item if code == NEVER else replace(item, droppable=True, drop_probability=own_probability(code))
