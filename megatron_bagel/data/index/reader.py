# SPDX-License-Identifier: Apache-2.0
"""Opens an index of any size in milliseconds: it reads the manifest and memory-maps everything else on first access.

A reader can be pickled and forked freely; every process maps the files separately.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL.Image import Image

from megatron_bagel.common.files import crc32
from megatron_bagel.data.index.arrow_files import read_planning_batch
from megatron_bagel.data.index.cached_sequences import CachedSequences
from megatron_bagel.data.index.columns import PlanningColumns, Ragged, concatenate_rows
from megatron_bagel.data.index.format import DatasetInfo, Manifest, ShardInfo, dataset_folder, read_manifest
from megatron_bagel.data.index.index_cache import IndexCache
from megatron_bagel.data.index.sequences import OPENING, StoredSequences, checked_size
from megatron_bagel.data.index.train_val_split import ALL_ROWS, TrainValRows, TrainValSplit
from megatron_bagel.data.keyed_random import keyed_uniform
from megatron_bagel.data.sources.dataset_config import VLM, DatasetEntry, GroupConfig
from megatron_bagel.data.sources.records import Record
from megatron_bagel.data.sources.stored_videos import has_video
from megatron_bagel.data.sources.video import VideoReader
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.data.transforms import decode_rgb


class Shard(PlanningColumns):
    """One memory-mapped shard. Its columns are read-only views with one entry per sample, and hold no open file."""

    def __init__(self, folder: Path, info: ShardInfo, check_all: bool = False, cache: IndexCache | None = None) -> None:
        """Map the shard's columns; ``check_all`` compares the checksum of every text and image that is read.

        ``cache`` fetches the files of an index that is in an object store; ``folder`` is then inside of it.

        Raises ValueError if a file is missing or its size differs from the manifest (an interrupted copy), or the columns are damaged.
        """
        stem = folder / info.name
        if cache is not None:
            cache.fetch_planning_files(stem, info)
        for suffix, (size, _) in info.files.items():
            if cache is None or suffix != "bin":
                checked_size(stem, suffix, size, "copy or build the index again")
        self._stem, self._info, self._check_all, self._cache = stem, info, check_all, cache
        columns = Path(f"{stem}.arrow")
        if info.arrow_crc32 is not None and crc32(columns) != info.arrow_crc32:
            raise ValueError(f"{columns} does not have the checksum of the manifest; copy or build the index again")
        batch = read_planning_batch(columns, is_verified=info.arrow_crc32 is not None)
        super().__init__(*(_ragged(batch.column(name)) for name in ("text_tokens", "structure", "width", "height")))
        self.source_file = batch.column("source_file").to_numpy()
        self.source_row = batch.column("source_row").to_numpy()

        if info.arrow_crc32 is None:
            _check_columns(self, info, columns)

    @cached_property
    def sequences(self) -> StoredSequences | CachedSequences:
        """Return the texts and images of the shard. Raises ValueError if the table of their offsets is damaged."""
        info = self._info
        if self._cache is not None:
            open_data = partial(self._cache.open_data, self._stem, info)
            count, size = info.texts + info.images, info.files["bin"][0]
            return CachedSequences.open(self._stem, count, size, "crc" in info.files, self._check_all, open_data)
        return StoredSequences.open(self._stem, info.texts + info.images, True, "crc" in info.files, self._check_all)


def _check_columns(shard: Shard, info: ShardInfo, path: Path) -> None:
    """Raise ValueError if columns without a recorded checksum do not fit each other or the manifest."""
    counts = len(shard.source_row), len(shard.text_tokens.values), len(shard.width.values)
    are_values_possible = np.array_equal(shard.width.offsets, shard.height.offsets) and all(
        not len(values) or values.min() >= minimum
        for values, minimum in (
            (shard.text_tokens.values, 0), (shard.structure.values, 0), (shard.width.values, 1), (shard.height.values, 1),
            (shard.source_file, 0), (shard.source_row, 0),
        )
    )  # fmt: skip
    if counts != (info.samples, info.texts, info.images) or not are_values_possible:
        raise ValueError(f"{path} is damaged (its columns do not fit each other or the manifest); copy or build the index again")


def _ragged(column: pa.ListArray) -> Ragged:
    return Ragged(column.offsets.to_numpy(), column.values.to_numpy())


Rows = TrainValRows | np.ndarray  # row numbers, indexed by an array of positions


class DatasetReader:
    """One dataset of an index. Row i is a sample; its texts and images are numbered from 0."""

    def __init__(
        self, folder: Path, info: DatasetInfo, vocabulary_size: int, check_all: bool = False, exif: str = "ignore",
        cache: IndexCache | None = None,
    ) -> None:  # fmt: skip
        self._cache = cache
        self.info, self.vocabulary_size, self._check_all, self.exif = info, vocabulary_size, check_all, exif
        self.group = info.group
        self.name = info.key
        self._folder = dataset_folder(folder, info.group, info.name)
        self._starts = np.cumsum([0, *(shard.samples for shard in info.shards)]).tolist()
        self._shards: dict[int, Shard] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def record(self, index: int) -> Record:
        """Return the planning data of row ``index``."""
        shard, row = self._locate(index)
        return Record(self.group, shard.text_tokens[row], shard.structure[row], shard.width[row], shard.height[row])

    def text_ids(self, index: int, text: int) -> np.ndarray:
        """Return the token ids (int64) of one text of row ``index``. Raises ValueError if the bytes are no valid ids."""
        shard, row = self._locate(index)
        if not 0 <= text < len(shard.text_tokens[row]):
            raise IndexError(f"{self.name} row {index} has {len(shard.text_tokens[row])} texts, no text {text}")
        with OPENING:
            data = shard.sequences.read(self._first_sequence(shard, row) + text, check=True)
            if len(data) != 4 * shard.text_tokens[row][text]:
                raise ValueError(f"text {text} has {len(data)} bytes, planned with {shard.text_tokens[row][text]} tokens of 4 bytes")
            ids = data.view("<i4").astype(np.int64)
            largest = data.view("<u4").max() if len(data) else 0  # a negative id is the largest of all
        if largest >= self.vocabulary_size:
            raise ValueError(f"text {text} has token ids from {ids.min()} to {ids.max()}, the vocabulary {self.vocabulary_size}")
        return ids

    def image_bytes(self, index: int, image: int) -> bytes:
        """Return the encoded image, unchanged from the source."""
        shard, row = self._locate(index)
        texts, images = len(shard.text_tokens[row]), len(shard.width[row])
        if not 0 <= image < images:
            raise IndexError(f"{self.name} row {index} has {images} images, no image {image}")
        with OPENING:
            return shard.sequences.read(self._first_sequence(shard, row) + texts + image).tobytes()

    def picture(self, index: int, image: int) -> Image:
        """Return one image of row ``index`` as RGB, of the size that planning uses; of a video its first frame.

        Raises ValueError if it cannot be decoded or has another size.
        """
        record = self.record(index)
        width, height = int(record.widths[image]), int(record.heights[image])
        data = self.image_bytes(index, image)
        is_video = self.group == VLM and has_video(record.structure)
        picture = VideoReader(data).frame(0) if is_video else decode_rgb(data, width * height, self.exif)
        if picture.size != (width, height):
            raise ValueError(f"the picture is {picture.width} x {picture.height}, the index says {width} x {height}; build it again")
        return picture

    def image_number_in_shard(self, index: int, image: int) -> tuple[str, int]:
        """Return the name of the shard and the number among its images of one image of row ``index``."""
        shard, row = self._locate(index)
        return self.info.shards[self._number_of(index)].name, int(shard.width.offsets[row]) + image

    def shard_rows(self, number: int) -> range:
        """Return the rows of the dataset in shard ``number``."""
        return range(self._starts[number], self._starts[number + 1])

    def source(self, index: int) -> tuple[str, int]:
        """Return the source file and the row in it of row ``index``, for messages."""
        shard, row = self._locate(index)
        return self.info.sources[int(shard.source_file[row])].path, int(shard.source_row[row])

    def columns(self, rows: np.ndarray) -> tuple[PlanningColumns, np.ndarray]:
        """Return the planning data of ``rows`` [n], shard by shard, and their order: ``rows[order]``."""
        order = np.argsort(rows)
        numbers = np.searchsorted(self._starts, rows[order], side="right") - 1
        bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist() if len(rows) else []
        parts = (
            (self._shard(number), rows[order[begin:end]] - self._starts[number])
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
            for number in [int(numbers[begin])]
        )
        return concatenate_rows(parts), order

    def shards(self) -> list[Shard]:
        """Return all shards in row order, for work on full columns."""
        return [self._shard(number) for number in range(len(self.info.shards))]

    def used_rows(self, entry: DatasetEntry, group: GroupConfig, train_val_split: TrainValSplit = ALL_ROWS) -> list[Rows]:
        """Return the rows of the part of ``train_val_split`` that ``num_used_data`` selects, in one or more passes.

        It counts files in order of name (parquet, tar) or lines (jsonl). Lines are the first ones, or with ``shuffle_lines`` a
        choice that depends only on ``shuffle_seed``. A number larger than that of the files adds passes over the first ones, because
        the original repeats the list of files.
        """

        def rows_up_to(stop: int) -> list[Rows]:
            rows = TrainValRows(self.name, len(self), stop, train_val_split)
            return [rows] if len(rows) else []

        num_used = entry.num_used_data
        if num_used is None:
            return rows_up_to(len(self))
        sources = self.info.sources
        if self._has_files:
            passes, num_remaining = divmod(num_used, len(sources))
            return rows_up_to(len(self)) * passes + rows_up_to(sum(source.samples for source in sources[:num_remaining]))
        lines = sources[0].rows
        if num_used >= lines:
            return rows_up_to(len(self))
        line_of_row = np.concatenate([shard.source_row for shard in self.shards()])
        if not group.shuffle_lines:
            return rows_up_to(int(np.searchsorted(line_of_row, num_used)))
        draws = keyed_uniform(group.shuffle_seed, self.name, "shuffle_lines", np.arange(lines))
        is_used = np.zeros(lines, dtype=bool)
        is_used[np.argsort(draws, kind="stable")[:num_used]] = True
        rows = np.flatnonzero(is_used[line_of_row])
        return [rows[TrainValRows(self.name, len(self), len(self), train_val_split).contains(rows)]]

    @property
    def _has_files(self) -> bool:
        """Return whether the sources are files of many rows each, and not the lines of one file."""
        return not self.info.sources or self.info.sources[0].path.endswith((".parquet", ".tar"))

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has rows 0 to {len(self) - 1}, no row {index}")
        number = self._number_of(index)
        return self._shard(number), int(index) - self._starts[number]

    def _number_of(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = Shard(self._folder, self.info.shards[number], self._check_all, self._cache)
        return self._shards[number]

    @staticmethod
    def _first_sequence(shard: Shard, row: int) -> int:
        return int(shard.text_tokens.offsets[row]) + int(shard.width.offsets[row])


@dataclass(frozen=True)
class IndexedSamples:
    """An opened index: its manifest and a reader per dataset, by ``group/name``."""

    manifest: Manifest
    datasets: Mapping[str, DatasetReader]

    @classmethod
    def open(
        cls, folder: str | Path, tokenizer: Tokenizer | None = None, check_all: bool = False, cache: IndexCache | None = None
    ) -> IndexedSamples:
        """Open an index; ``check_all`` compares the checksum of every image that is read, not only of texts and small images.

        ``cache`` fetches the files of an index in an object store, and ``folder`` is then ``cache.folder``.

        Raises ValueError if ``folder`` holds no index of this version, or one of another tokenizer.
        """
        folder = Path(folder)
        manifest = read_manifest(folder) if cache is None else cache.fetch_manifest()
        if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise ValueError(
                f"the index {folder} was built with the tokenizer {manifest.tokenizer_path}, which differs from {tokenizer.path}; "
                "build the index again with this one, or train with that one"
            )
        readers = (DatasetReader(folder, info, manifest.vocabulary_size, check_all, manifest.exif, cache) for info in manifest.datasets)
        return cls(manifest, {reader.info.key: reader for reader in readers})

    def reader(self, group: GroupConfig, entry: DatasetEntry) -> DatasetReader:
        """Return the reader of one dataset of the config. Raises ValueError if the index lacks it."""
        key = f"{group.name}/{entry.name}"
        if key not in self.datasets:
            raise ValueError(f"the index has no dataset {key}; it has {', '.join(self.datasets)}; build it again with this dataset config")
        return self.datasets[key]
