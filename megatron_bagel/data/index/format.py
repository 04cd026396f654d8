# SPDX-License-Identifier: Apache-2.0
"""The format of the index on disk, described once for its writer and its reader.

    INDEX/manifest.json                      datasets, sources and tokenizer; written last
    INDEX/skipped.jsonl                      every skipped row: dataset, file, row, reason
    INDEX/<group>/<dataset>/00000.bin .idx   bytes (Megatron-Core's IndexedDataset of uint8): per sample its texts, then its images;
                                             a text is its token ids as little-endian int32, an image the bytes of the source
    INDEX/<group>/<dataset>/00000.crc        CRC-32 of every text and image, in the order of the .bin
    INDEX/<group>/<dataset>/00000.arrow      planning data, one row per sample (Arrow IPC, one record batch)

A dataset is cut into shards by its source rows alone, so an index has the same bytes for any number of processes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from megatron_bagel.common.json_files import read_json

SCHEMA_VERSION = 1
MANIFEST, SKIPPED = "manifest.json", "skipped.jsonl"
SHARD_FILES = ("bin", "idx", "arrow", "crc")  # shards of earlier versions lack the last one
TEXT_MODE, IMAGE_MODE = 0, 1  # Megatron-Core's per-sequence modes

_INT32_LIST = pa.list_(pa.field("item", pa.int32(), nullable=False))
PLANNING_SCHEMA = pa.schema([
    pa.field("text_tokens", _INT32_LIST, nullable=False),  # tokens of every text
    pa.field("structure", _INT32_LIST, nullable=False),  # see records.py
    pa.field("width", _INT32_LIST, nullable=False),  # pixels of every image as decoded (Manifest.exif)
    pa.field("height", _INT32_LIST, nullable=False),
    pa.field("source_file", pa.int32(), nullable=False),  # position among the dataset's sources
    pa.field("source_row", pa.int64(), nullable=False),
])  # fmt: skip


@dataclass(frozen=True)
class ShardInfo:
    """One shard: ``name`` is the stem of its files, and ``files`` maps a suffix to (bytes, sha256).

    ``arrow_crc32`` is compared when the planning columns are opened; earlier versions recorded none. ``source_checksums`` maps the number
    of a source whose first row is in this shard to (bytes, crc32) of the file.
    """

    name: str
    samples: int
    texts: int
    images: int
    tokens: int
    skipped: dict[str, int]
    files: dict[str, tuple[int, str]]
    samples_per_source: dict[str, int]
    arrow_crc32: int | None = None
    source_checksums: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class SourceInfo:
    """One source file of a dataset: the number of its rows, and of those that became samples.

    ``bytes`` and ``crc32`` identify its content; None for remote files, and in an index of an earlier version.
    """

    path: str
    rows: int
    samples: int
    bytes: int | None = None
    crc32: int | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of the index; ``skipped`` counts skipped rows by reason without its particulars."""

    group: str
    name: str
    sources: list[SourceInfo]
    shards: list[ShardInfo]
    skipped: dict[str, int]

    @property
    def key(self) -> str:
        """Return ``group/name``: the dataset's name everywhere, and the key of its random draws."""
        return f"{self.group}/{self.name}"

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    ``build_key`` identifies the inputs: sources with their times, tokenizer, settings. ``inputs_key`` leaves times and contents out, which
    the sources themselves record; an index of an earlier version has none.

    ``exif`` says whether pictures are turned as their EXIF orientation says ("turn") or shown as they are stored ("ignore"). Indexes
    of earlier versions do not record it and were made with "ignore".
    """

    schema_version: int
    build_key: str
    tokenizer_fingerprint: str
    tokenizer_path: str
    vocabulary_size: int
    datasets: list[DatasetInfo]
    inputs_key: str | None = None
    exif: str = "ignore"

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    def summary(self) -> str:
        """Return lines for the console: the contents of each dataset, and the skipped rows by reason."""
        lines = []
        for dataset in self.datasets:
            images, tokens = (sum(getattr(shard, name) for shard in dataset.shards) for name in ("images", "tokens"))
            lines.append(f"{dataset.key}: {dataset.samples} samples, {images} images, {tokens} text tokens, {len(dataset.shards)} shard(s)")
            lines += [f"  skipped {count}: {reason}" for reason, count in sorted(dataset.skipped.items(), key=lambda item: -item[1])]
        return "\n".join(lines)


def shard_from_dict(content: dict[str, Any]) -> ShardInfo:
    """Invert ``dataclasses.asdict`` after a round trip through JSON."""
    pairs = {name: {key: tuple(value) for key, value in content.get(name, {}).items()} for name in ("files", "source_checksums")}
    return ShardInfo(**{**content, **pairs})


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the index in ``folder``. Raises ValueError if there is none, or one of another schema."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not an index: it has no {MANIFEST}; build one with data_tools/build_index.py")
    content = read_json(path, "index")
    version = content.get("schema_version")
    if isinstance(version, int) and version != SCHEMA_VERSION:
        remedy = "update megatron_bagel" if version > SCHEMA_VERSION else "build the index again"
        raise ValueError(f"{path} has schema {version}, this version reads {SCHEMA_VERSION}; {remedy}")
    try:
        datasets = [
            DatasetInfo(
                entry["group"],
                entry["name"],
                [SourceInfo(**source) for source in entry["sources"]],
                [shard_from_dict(shard) for shard in entry["shards"]],
                entry["skipped"],
            )
            for entry in content["datasets"]
        ]
        return Manifest(**{**content, "datasets": datasets})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest ({error!r}); build the index again") from error


def dataset_folder(index: Path, group: str, name: str) -> Path:
    """Return the folder of a dataset's shards."""
    return index / group / name
