"""A dataset group of the config, over the index: what the planner measures and the loader reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image

from megatron_bagel.data.index.latent_cache import LatentCache
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples, Rows
from megatron_bagel.data.index.train_val_split import EVERYTHING, Split
from megatron_bagel.data.planner.cost_model import Measures
from megatron_bagel.data.planner.sample_lengths import measure_rows
from megatron_bagel.data.planner.sample_plan import (
    KeyedDraws,
    PlanSettings,
    build_items,
    check_image_limits,
    choose_items,
    drop_conditions,
    transform_of,
)
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.transforms import decode_rgb, image_tensor
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.pack import PackImage

_MEASURED = 1 << 13  # rows measured at once: the arrays stay in the cache, and one conversation of many turns widens few of them


@dataclass(frozen=True)
class _Pass:
    """A run of the group's indexes: pass ``number`` of ``passes`` over rows of one dataset."""

    reader: DatasetReader
    rows: Rows
    number: int
    passes: int


class _LastPicture(threading.local):
    """The picture that a thread decoded last, and its place: dataset, row, number. It does not travel with a pickled source."""

    place: tuple[str, int, int] | None = None
    picture: Image

    def __reduce__(self) -> tuple[type[_LastPicture], tuple[()]]:
        return _LastPicture, ()


class GroupSource:
    """The samples of a group: its datasets one after the other, each in one or more passes (`DatasetReader.used_rows`).

    Pass k of n in epoch e draws as epoch e * n + k of its dataset, so that passes differ in captions, dropout and noise.
    """

    def __init__(
        self, group: GroupConfig, readers: Sequence[DatasetReader], settings: PlanSettings, split: Split = EVERYTHING,
        latents: LatentCache | None = None,
    ) -> None:  # fmt: skip
        """``split`` says which rows are read; VAE images come from ``latents`` where given.

        Raises ValueError when the group's images can be too large for the model, or when it has no sample at all.
        """
        check_image_limits(group, settings.layout, settings.visual_und)
        self.group, self.settings, self.latents = group, settings, latents
        self.name, self.weight, self.is_mandatory = group.name, group.weight, group.is_mandatory
        self.keep_position = group.resume_data_status
        self._last = _LastPicture()
        self._passes: list[_Pass] = []
        for entry, reader in zip(group.datasets, readers, strict=True):
            passes = reader.used_rows(entry, group, split)
            if len(group.datasets) == 1:
                passes = passes[:1]  # alone in its group, a dataset's repetitions change nothing
            self._passes += [_Pass(reader, rows, number, len(passes)) for number, rows in enumerate(passes)]
        self._starts = np.cumsum([0, *(len(each.rows) for each in self._passes)])
        if not len(self):
            names = ", ".join(entry.name for entry in group.datasets)
            raise ValueError(
                f"group {group.name} has no sample for {split.part}: the index of {names} is empty, num_used_data takes only skipped "
                "rows, or --split leaves none"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def datasets(self) -> dict[str, range]:
        """Name of each dataset, and the group's indexes of its first pass: each of its rows once."""
        ranges: dict[str, range] = {}
        for number, each in enumerate(self._passes):
            ranges.setdefault(each.reader.name, range(int(self._starts[number]), int(self._starts[number + 1])))
        return ranges

    def siblings(self, index: int) -> range:
        """The group's indexes of the pass over a dataset that ``index`` belongs to."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return range(int(self._starts[number]), int(self._starts[number + 1]))

    def measure(self, indexes: np.ndarray, epoch: int) -> Measures:
        """Lengths and costs of samples [n] in ``epoch``, without reading text or pixels."""
        if len(self._passes) == 1 and len(indexes):
            alone = self._passes[0]
            return Measures(*self._measure_pass(alone, alone.rows[indexes], epoch))
        measured = np.zeros((3, len(indexes)), dtype=np.int64)
        numbers = np.searchsorted(self._starts, indexes, side="right") - 1
        for number in np.unique(numbers):
            each, mine = self._passes[number], numbers == number
            offsets = indexes[mine] - self._starts[number]
            measured[:, mine] = self._measure_pass(each, each.rows[offsets], epoch * each.passes + each.number)
        return Measures(*measured)

    def sample(self, index: int, epoch: int) -> Sample:
        """The plan of one sample, with its token ids."""
        reader, row, epoch = self._locate(index, epoch)
        record = reader.record(row)
        draws = KeyedDraws(self.settings.seed, reader.name, row, epoch)
        planned = drop_conditions(choose_items(record, draws), self.settings.dropout, draws)
        if not self.settings.visual_und:
            planned = [item for item in planned if item.kind != "vit"]
        items = build_items(planned, record, self.group, lambda text: reader.text_ids(row, text))
        return Sample(reader.name, row, epoch, items, self.group.name)

    def pixels(self, index: int, image: PackImage) -> torch.Tensor:
        """One image of a sample after its transform, float32 [3, height, width]; a VAE image of a source with a latent cache is its
        posterior, [2 * z, height / downsample, width / downsample].

        Raises ValueError when it cannot be decoded, or is another picture than the index says.
        """
        if self.latents is None or image.kind != "vae":
            return self.picture(index, image)
        reader, row, _ = self._locate(index, 0)
        arch = self.latents.arch
        return self.latents.posterior(reader, row, image.image, (image.height // arch.downsample, image.width // arch.downsample))

    def picture(self, index: int, image: PackImage) -> torch.Tensor:
        """One image of a sample after its transform, float32 [3, height, width], whether a latent cache holds it or not.

        Raises ValueError as `pixels` does.
        """
        reader, row, _ = self._locate(index, 0)
        decoded = self._decoded(reader, row, image.image)
        return image_tensor(decoded, transform_of(self.group, image.kind), image.width, image.height)

    def _decoded(self, reader: DatasetReader, row: int, number: int) -> Image:
        """One picture of a row. The last one is kept: ViT and autoencoder often take the same."""
        if self._last.place == (reader.name, row, number):
            return self._last.picture
        record = reader.record(row)
        width, height = int(record.widths[number]), int(record.heights[number])
        decoded = decode_rgb(reader.image_bytes(row, number), width * height)
        if decoded.size != (width, height):
            raise ValueError(f"the picture is {decoded.width} x {decoded.height}, the index says {width} x {height}; build it again")
        self._last.place, self._last.picture = (reader.name, row, number), decoded
        return decoded

    def describe(self, index: int) -> str:
        """Where a sample comes from, for messages."""
        reader, row, _ = self._locate(index, 0)
        path, line = reader.source(row)
        return f"{reader.name} sample {row} ({path}, row {line})"

    def _measure_pass(self, each: _Pass, rows: np.ndarray, epoch: int) -> np.ndarray:
        measured = np.zeros((3, len(rows)), dtype=np.int64)
        columns, order = each.reader.columns(rows)
        for first in range(0, len(rows), _MEASURED):
            mine = order[first : first + _MEASURED]
            places = np.arange(first, first + len(mine))
            measured[:, mine] = measure_rows(columns, places, each.reader.name, rows[mine], epoch, self.group, self.settings)
        return measured

    def _locate(self, index: int, epoch: int) -> tuple[DatasetReader, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"group {self.name} has samples 0 to {len(self) - 1}, no sample {index}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        each = self._passes[number]
        return each.reader, int(each.rows[index - int(self._starts[number])]), epoch * each.passes + each.number


def open_sources(
    groups: Sequence[GroupConfig], index: IndexedSamples, settings: PlanSettings, split: Split = EVERYTHING,
    latents: LatentCache | None = None,
) -> list[GroupSource]:  # fmt: skip
    """One source per group, in the order of the config. Raises ValueError for a dataset that the index lacks."""
    return [GroupSource(group, [index.reader(group, entry) for entry in group.datasets], settings, split, latents) for group in groups]
