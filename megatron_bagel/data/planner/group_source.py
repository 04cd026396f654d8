# SPDX-License-Identifier: Apache-2.0
"""A dataset group of the config over the index: the planner measures it, and the loader reads it."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image

from megatron_bagel.data.index.latent_cache import LatentCache
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples, Rows
from megatron_bagel.data.index.train_val_split import ALL_ROWS, TrainValSplit
from megatron_bagel.data.planner.cost_model import Measures
from megatron_bagel.data.planner.mix import SourceRule
from megatron_bagel.data.planner.planned_item import KeyedDraws
from megatron_bagel.data.planner.sample_lengths import measure_rows
from megatron_bagel.data.planner.sample_plan import (
    PlanSettings,
    build_items,
    check_image_limits,
    choose_items,
    drop_conditions,
    transform_of,
)
from megatron_bagel.data.planner.shown_frames import expanded, shown_images, stored_items
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.sources.video import VideoReader
from megatron_bagel.data.transforms import RawImage, resized
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import PackImage

_ROWS_PER_MEASUREMENT = 1 << 13  # the arrays stay in the CPU's cache, and one conversation of many turns widens few of them


@dataclass(frozen=True)
class _Pass:
    """A run of the group's indexes: pass ``number`` of ``passes`` over rows of one dataset."""

    reader: DatasetReader
    rows: Rows
    number: int
    passes: int


class _LastPicture(threading.local):
    """The last picture that a thread decoded, and its location: dataset, row, number. It is not pickled with the source."""

    location: tuple[str, int, int] | None = None
    picture: Image

    def __reduce__(self) -> tuple[type[_LastPicture], tuple[()]]:
        return _LastPicture, ()


class _LastVideo(threading.local):
    """The last video that a thread opened, and its location: dataset, row, number. It is not pickled with the source."""

    location: tuple[str, int, int] | None = None
    reader: VideoReader

    def __reduce__(self) -> tuple[type[_LastVideo], tuple[()]]:
        return _LastVideo, ()


class GroupSource:
    """The samples of a group: its datasets one after the other, each in one or more passes (``DatasetReader.used_rows``).

    Pass k of n in epoch e draws as epoch e * n + k of its dataset, so that passes differ in captions, dropout and noise.
    """

    def __init__(
        self, group: GroupConfig, readers: Sequence[DatasetReader], settings: PlanSettings, train_val_split: TrainValSplit = ALL_ROWS,
        latents: LatentCache | None = None,
    ) -> None:  # fmt: skip
        """Open the group over the rows of ``train_val_split``; VAE images come from ``latents`` if given.

        Raises ValueError if the group's images can be too large for the model, or if it has no sample at all.
        """
        check_image_limits(group, settings.layout, settings.visual_und)
        self.group, self.settings, self.latents = group, settings, latents
        self.name, self.weight, self.is_mandatory = group.source_name, group.weight, group.is_mandatory
        self.keep_position = group.resume_data_status
        self._last_picture = _LastPicture()
        self._last_video = _LastVideo()
        self._last_located: tuple[int, _Pass, int] | None = None  # index, and its row in the pass
        self._passes: list[_Pass] = []
        for entry, reader in zip(group.datasets, readers, strict=True):
            passes = reader.used_rows(entry, group, train_val_split)
            if len(group.datasets) == 1:
                passes = passes[:1]  # repeating the only dataset of a group changes nothing
            self._passes += [_Pass(reader, rows, number, len(passes)) for number, rows in enumerate(passes)]
        self._starts: list[int] = np.cumsum([0, *(len(dataset_pass.rows) for dataset_pass in self._passes)]).tolist()
        if not len(self):
            names = ", ".join(entry.name for entry in group.datasets)
            raise ValueError(
                f"group {group.name} has no sample for {train_val_split.part}: the index of {names} is empty, num_used_data selects only "
                "skipped rows, or --split leaves none"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def rule(self) -> SourceRule | None:
        """Return how often it is drawn where that is more than a constant weight."""
        limit = self.group.max_epochs[0] if self.group.max_epochs else None
        return SourceRule(self.group.points, limit) if self.group.weight_points or limit is not None else None

    def datasets(self) -> dict[str, range]:
        """Return each dataset's name and the group's indexes of its first pass, which has each of its rows once."""
        ranges: dict[str, range] = {}
        for number, dataset_pass in enumerate(self._passes):
            ranges.setdefault(dataset_pass.reader.name, range(self._starts[number], self._starts[number + 1]))
        return ranges

    def readers(self) -> list[DatasetReader]:
        """Return the datasets with rows, in the order of the group."""
        return list(dict.fromkeys(dataset_pass.reader for dataset_pass in self._passes))

    def siblings(self, index: int) -> range:
        """Return the group's indexes of the pass over a dataset that contains ``index``."""
        number = bisect.bisect_right(self._starts, index) - 1
        return range(self._starts[number], self._starts[number + 1])

    def measure(self, indexes: np.ndarray, epoch: int) -> Measures:
        """Return lengths and costs of samples [n] in ``epoch``, without reading text or pixels."""
        if len(self._passes) == 1 and len(indexes):
            single_pass = self._passes[0]
            return Measures(*self._measure_pass(single_pass, single_pass.rows[indexes], epoch))
        measured = np.zeros((3, len(indexes)), dtype=np.int64)
        numbers = np.searchsorted(self._starts, indexes, side="right") - 1
        for number in np.unique(numbers):
            dataset_pass, is_pass = self._passes[number], numbers == number
            offsets = indexes[is_pass] - self._starts[number]
            measured[:, is_pass] = self._measure_pass(
                dataset_pass, dataset_pass.rows[offsets], epoch * dataset_pass.passes + dataset_pass.number
            )
        return Measures(*measured)

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the plan of one sample, with its token ids."""
        reader, row, epoch = self._locate(index, epoch)
        record = reader.record(row)
        shown = shown_images(record, self.group, self.settings.seed, reader.name, row, epoch)
        if shown is not None:
            record = expanded(record, shown)
        draws = KeyedDraws(self.settings.seed, reader.name, row, epoch)
        planned = drop_conditions(choose_items(record, draws), self.settings.dropout, draws)
        if not self.settings.visual_und:
            planned = [item for item in planned if item.kind != "vit"]
        items = build_items(planned, record, self.group, lambda text: reader.text_ids(row, text), self.settings.next_tokens)
        if shown is not None:
            items = stored_items(items, shown)
        return Sample(reader.name, row, epoch, items, self.group.name)

    def pixels(self, index: int, image: PackImage) -> torch.Tensor | RawImage:
        """Return one image of a sample after its transform.

        With a latent cache, a VAE image is its posterior, float32 [2 * z, height / downsample, width / downsample].

        Raises:
            ValueError: If it cannot be decoded, or differs from the picture in the index.
        """
        if self.latents is None or image.kind != "vae":
            return self._resized(index, image)
        reader, row, _ = self._locate(index, 0)
        arch = self.latents.arch
        return self.latents.posterior(reader, row, image.image, (image.height // arch.downsample, image.width // arch.downsample))

    def picture(self, index: int, image: PackImage) -> torch.Tensor:
        """Return one image of a sample after its transform, float32 [3, height, width], also if a latent cache holds it.

        Raises ValueError as ``pixels`` does.
        """
        return self._resized(index, image).normalized()

    def _resized(self, index: int, image: PackImage) -> RawImage:
        reader, row, _ = self._locate(index, 0)
        decoded = self._decoded(reader, row, image.image) if image.frame is None else self._frame(reader, row, image.image, image.frame)
        return resized(decoded, transform_of(self.group, image.kind), image.width, image.height)

    def _decoded(self, reader: DatasetReader, row: int, number: int) -> Image:
        """Decode one picture of a row. The last one is cached, because ViT and autoencoder often take the same."""
        if self._last_picture.location == (reader.name, row, number):
            return self._last_picture.picture
        decoded = reader.picture(row, number)
        self._last_picture.location, self._last_picture.picture = (reader.name, row, number), decoded
        return decoded

    def _frame(self, reader: DatasetReader, row: int, number: int, frame: int) -> Image:
        """Decode one frame of a video. The last video stays open, because the frames of a sample come in ascending order."""
        last = self._last_video
        if last.location != (reader.name, row, number):
            last.location, last.reader = (reader.name, row, number), VideoReader(reader.image_bytes(row, number))
        record, picture = reader.record(row), last.reader.frame(frame)
        width, height = int(record.widths[number]), int(record.heights[number])
        if picture.size != (width, height):
            raise ValueError(f"frame {frame} is {picture.width} x {picture.height}, the index says {width} x {height}; build it again")
        return picture

    def describe(self, index: int) -> str:
        """Return where a sample comes from, for messages."""
        reader, row, _ = self._locate(index, 0)
        path, line = reader.source(row)
        return f"{reader.name} sample {row} ({path}, row {line})"

    def _measure_pass(self, dataset_pass: _Pass, rows: np.ndarray, epoch: int) -> np.ndarray:
        measured = np.zeros((3, len(rows)), dtype=np.int64)
        columns, order = dataset_pass.reader.columns(rows)
        for start in range(0, len(rows), _ROWS_PER_MEASUREMENT):
            chunk = order[start : start + _ROWS_PER_MEASUREMENT]
            column_rows = np.arange(start, start + len(chunk))
            measured[:, chunk] = measure_rows(columns, column_rows, dataset_pass.reader.name, rows[chunk], epoch, self.group, self.settings)
        return measured

    def _locate(self, index: int, epoch: int) -> tuple[DatasetReader, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"group {self.name} has samples 0 to {len(self) - 1}, no sample {index}")
        last = self._last_located  # one read: other threads may replace it
        if last is None or last[0] != index:
            number = bisect.bisect_right(self._starts, index) - 1
            dataset_pass = self._passes[number]
            last = self._last_located = (index, dataset_pass, int(dataset_pass.rows[index - self._starts[number]]))
        _, dataset_pass, row = last
        return dataset_pass.reader, row, epoch * dataset_pass.passes + dataset_pass.number


def open_sources(
    groups: Sequence[GroupConfig], index: IndexedSamples, settings: PlanSettings, train_val_split: TrainValSplit = ALL_ROWS,
    latents: LatentCache | None = None,
) -> list[GroupSource]:  # fmt: skip
    """Open one source per group, or per dataset where datasets have weights, in the order of the config.

    Raises ValueError for a dataset that the index lacks.
    """
    return [
        GroupSource(part, [index.reader(part, entry) for entry in part.datasets], settings, train_val_split, latents)
        for group in groups
        for part in group.parts()
    ]
