# SPDX-License-Identifier: Apache-2.0
"""Conversations with stored videos as planning knows them: an image for each frame that an epoch shows.

Both forms of planning go through it: one sample with its plan, and many as columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_bagel.data.index.columns import PlanningColumns, Ragged
from megatron_bagel.data.sources.dataset_config import VLM, GroupConfig
from megatron_bagel.data.sources.records import Record
from megatron_bagel.data.sources.stored_videos import VIDEO_ITEM, ShownImages, has_video, with_frames
from megatron_bagel.data.sources.video import FrameSampler, video_library
from megatron_bagel.layout.items import Item


def frame_sampler(group: GroupConfig) -> FrameSampler:
    """Return the group's sampler. Raises ValueError if the config has none although the index holds videos, or PyAV is not installed."""
    video_library()
    if group.frame_sampler is None:
        raise ValueError(
            f"group {group.name}: the index holds videos (megatron-bagel data build --store_videos); give the group frame_sampler_args"
        )
    return group.frame_sampler


def shown_images(record: Record, group: GroupConfig, seed: int, dataset: str, row: int, epoch: int) -> ShownImages | None:
    """Return the images of one sample in an epoch, or None for a sample without a video."""
    if record.group != VLM or not has_video(record.structure):
        return None
    return with_frames(record.structure, frame_sampler(group), seed, dataset, row, epoch)


def expanded(record: Record, shown: ShownImages) -> Record:
    """Return the planning data of a sample with its shown images in place of the stored ones."""
    return replace(record, structure=shown.structure, widths=record.widths[shown.stored], heights=record.heights[shown.stored])


def stored_items(items: Sequence[Item], shown: ShownImages) -> tuple[Item, ...]:
    """Return a sample's items with the numbers of stored images and of frames in place of those of shown images."""
    return tuple(item if item.kind == "text" else _stored(item, shown) for item in items)


def _stored(item: Item, shown: ShownImages) -> Item:
    frame = int(shown.frames[item.image])
    return replace(item, image=int(shown.stored[item.image]), frame=frame if frame >= 0 else None)


def expanded_columns(
    columns: PlanningColumns, rows: np.ndarray, group: GroupConfig, seed: int, dataset: str, indexes: np.ndarray, epoch: int
) -> tuple[PlanningColumns, np.ndarray]:
    """Return columns of ``rows`` with shown images in place of videos, and the rows in them. Without a video both stay as they are.

    ``indexes`` are the rows in ``dataset``.
    """
    if group.name != VLM or columns.largest_number < VIDEO_ITEM:
        return columns, rows
    records = []
    for row, index in zip(rows.tolist(), indexes.tolist(), strict=True):
        record = Record(VLM, columns.text_tokens[row], columns.structure[row], columns.width[row], columns.height[row])
        shown = shown_images(record, group, seed, dataset, index, epoch)
        records.append(record if shown is None else expanded(record, shown))
    parts = ("text_tokens", "structure", "widths", "heights")
    return PlanningColumns(*(_ragged([getattr(record, part) for record in records]) for part in parts)), np.arange(len(rows))


def _ragged(values: Sequence[np.ndarray]) -> Ragged:
    return Ragged(np.cumsum([0, *map(len, values)]), np.concatenate([np.empty(0, dtype=np.int32), *values]))
