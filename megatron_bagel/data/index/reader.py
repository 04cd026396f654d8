"""Opens an index in milliseconds whatever its size: the manifest is read, everything else is memory-mapped when first touched.

A reader can be pickled and forked freely; every process maps the files for itself.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_bagel.data.index.columns import PlanningColumns, Ragged, gathered
from megatron_bagel.data.index.format import DatasetInfo, Manifest, ShardInfo, dataset_folder, read_manifest
from megatron_bagel.data.index.train_val_split import EVERYTHING, Split, SplitRows
from megatron_bagel.data.keyed_random import keyed_uniform
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, DatasetEntry, GroupConfig
from megatron_bagel.data.sources.records import Record
from megatron_bagel.data.tokenizer import Tokenizer

OPENING = threading.Lock()  # held by a thread from `open_indexed` until it has copied what it wants


@lru_cache(maxsize=64)
def open_indexed(stem: str, changed: int, multimodal: bool) -> IndexedDataset:
    """The sequences of a shard. An open one holds three file descriptors, and a large index has more shards than a process may have
    files open; so a process keeps the ones used last. Views of their bytes must not outlive the next call.

    ``changed``, the time of the ``.bin``, tells a shard from another one that lay there before.
    """
    return IndexedDataset(stem, multimodal=multimodal, mmap=True)


class Shard(PlanningColumns):
    """One shard, mapped into memory. The columns are read-only views of the file, one entry per sample; they hold no open file."""

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        """Raises ValueError when a file is missing or has another size than the manifest says (a copy that broke off)."""
        stem = folder / info.name
        for ending, (size, _) in info.files.items():
            path = Path(f"{stem}.{ending}")
            found = path.stat() if path.is_file() else None
            if found is None or found.st_size != size:
                has = "no file" if found is None else found.st_size
                raise ValueError(f"{path} should have {size} bytes but has {has}; copy or build the index again")
        self._bytes = str(stem), Path(f"{stem}.bin").stat().st_mtime_ns, True
        with pa.memory_map(f"{stem}.arrow") as mapped:  # the columns keep the mapping when the file is closed
            batch = pa.ipc.open_file(mapped).get_batch(0)
        super().__init__(*(_ragged(batch.column(name)) for name in ("text_tokens", "structure", "width", "height")))
        self.source_file = batch.column("source_file").to_numpy()
        self.source_row = batch.column("source_row").to_numpy()

    def sequence(self, number: int) -> np.ndarray:
        """Bytes of one text or image of the shard, as a uint8 view."""
        return open_indexed(*self._bytes)[number][0]


def _ragged(column: pa.ListArray) -> Ragged:
    return Ragged(column.offsets.to_numpy(), column.values.to_numpy())


Rows = SplitRows | np.ndarray  # row numbers; either is indexed by an array of places


class DatasetReader:
    """One dataset of an index. Row i is a sample; its texts and images are numbered from 0."""

    def __init__(self, folder: Path, info: DatasetInfo, vocabulary_size: int) -> None:
        self.info, self.vocabulary_size = info, vocabulary_size
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
        """Planning data of row ``index``."""
        shard, row = self._locate(index)
        return Record(self.group, shard.text_tokens[row], shard.structure[row], shard.width[row], shard.height[row])

    def text_ids(self, index: int, text: int) -> np.ndarray:
        """Token ids (int64) of one text of row ``index``. Raises ValueError when its bytes are none."""
        shard, row = self._locate(index)
        if not 0 <= text < len(shard.text_tokens[row]):
            raise IndexError(f"{self.name} row {index} has {len(shard.text_tokens[row])} texts, no text {text}")
        with OPENING:
            ids = shard.sequence(self._first_sequence(shard, row) + text).view("<i4").astype(np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary_size:
            raise ValueError(f"text {text} has token ids from {ids.min()} to {ids.max()}, the vocabulary {self.vocabulary_size}")
        return ids

    def image_bytes(self, index: int, image: int) -> bytes:
        """The encoded image as it was in the source."""
        shard, row = self._locate(index)
        texts, images = len(shard.text_tokens[row]), len(shard.width[row])
        if not 0 <= image < images:
            raise IndexError(f"{self.name} row {index} has {images} images, no image {image}")
        with OPENING:
            return shard.sequence(self._first_sequence(shard, row) + texts + image).tobytes()

    def image_place(self, index: int, image: int) -> tuple[str, int]:
        """(name of the shard, number among its images) of one image of row ``index``."""
        shard, row = self._locate(index)
        return self.info.shards[self._number_of(index)].name, int(shard.width.offsets[row]) + image

    def shard_rows(self, number: int) -> range:
        """Rows of the dataset that lie in shard ``number``."""
        return range(self._starts[number], self._starts[number + 1])

    def source(self, index: int) -> tuple[str, int]:
        """(file, row in it) that row ``index`` came from, for messages."""
        shard, row = self._locate(index)
        return self.info.sources[int(shard.source_file[row])].path, int(shard.source_row[row])

    def columns(self, rows: np.ndarray) -> tuple[PlanningColumns, np.ndarray]:
        """Planning data of ``rows`` [n], gathered shard by shard, and the order in which they come: ``rows[order]``."""
        order = np.argsort(rows)
        numbers = np.searchsorted(self._starts, rows[order], side="right") - 1
        bounds = np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist() if len(rows) else []
        parts = (
            (self._shard(number), rows[order[begin:end]] - self._starts[number])
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True)
            for number in [int(numbers[begin])]
        )
        return gathered(parts), order

    def shards(self) -> list[Shard]:
        """All shards in row order, for work on whole columns."""
        return [self._shard(number) for number in range(len(self.info.shards))]

    def used_rows(self, entry: DatasetEntry, group: GroupConfig, split: Split = EVERYTHING) -> list[Rows]:
        """Rows of the part of ``split`` that ``num_used_data`` takes, in one or more passes: those of the first files by name (T2I,
        editing), or of a number of lines (VLM, text).

        Lines are the first ones, or with ``shuffle_lines`` a choice that depends on ``shuffle_seed`` alone. More files than there
        are give further passes over the first ones, as the original repeats the list of files.
        """

        def first(stop: int) -> list[Rows]:
            rows = SplitRows(self.name, len(self), stop, split)
            return [rows] if len(rows) else []

        used = entry.num_used_data
        if used is None:
            return first(len(self))
        sources = self.info.sources
        if self.group in (T2I, EDIT):
            passes, rest = divmod(used, len(sources))
            return first(len(self)) * passes + first(sum(source.samples for source in sources[:rest]))
        lines = sources[0].rows
        if used >= lines:
            return first(len(self))
        line_of_row = np.concatenate([shard.source_row for shard in self.shards()])
        if not group.shuffle_lines:
            return first(int(np.searchsorted(line_of_row, used)))
        draws = keyed_uniform(group.shuffle_seed, self.name, "shuffle_lines", np.arange(lines))
        taken = np.zeros(lines, dtype=bool)
        taken[np.argsort(draws, kind="stable")[:used]] = True
        rows = np.flatnonzero(taken[line_of_row])
        return [rows[SplitRows(self.name, len(self), len(self), split).contains(rows)]]

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has rows 0 to {len(self) - 1}, no row {index}")
        number = self._number_of(index)
        return self._shard(number), int(index) - self._starts[number]

    def _number_of(self, index: int) -> int:
        return bisect.bisect_right(self._starts, index) - 1

    def _shard(self, number: int) -> Shard:
        if number not in self._shards:
            self._shards[number] = Shard(self._folder, self.info.shards[number])
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
    def open(cls, folder: str | Path, tokenizer: Tokenizer | None = None) -> IndexedSamples:
        """Raises ValueError when ``folder`` holds no index of this version, or one made with another tokenizer than the one given."""
        folder = Path(folder)
        manifest = read_manifest(folder)
        if tokenizer is not None and tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise ValueError(
                f"the index {folder} was built with the tokenizer {manifest.tokenizer_path}, which differs from {tokenizer.path}; "
                "build the index again with this one, or train with that one"
            )
        return cls(manifest, {info.key: DatasetReader(folder, info, manifest.vocabulary_size) for info in manifest.datasets})

    def reader(self, group: GroupConfig, entry: DatasetEntry) -> DatasetReader:
        """The reader of one dataset of the config. Raises ValueError when the index lacks it."""
        key = f"{group.name}/{entry.name}"
        if key not in self.datasets:
            raise ValueError(f"the index has no dataset {key}; it has {', '.join(self.datasets)}; build it again with this dataset config")
        return self.datasets[key]
