# SPDX-License-Identifier: Apache-2.0
"""Writes a copy of an index without the samples in which verification finds a problem. The rest of the bytes stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_bagel.common.files import crc32, digest, write_whole
from megatron_bagel.data.index.arrow_files import read_planning_batch
from megatron_bagel.data.index.format import (
    IMAGE_MODE,
    MANIFEST,
    SHARD_FILES,
    SKIPPED,
    TEXT_MODE,
    DatasetInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    dataset_folder,
)
from megatron_bagel.data.index.publish import short_reason, skipped_line
from megatron_bagel.data.index.reader import Shard
from megatron_bagel.data.index.sequences import write_checksums
from megatron_bagel.data.index.verify import sample_problems
from megatron_bagel.data.index.write_arrow import write_planning_batch


def write_clean_copy(index: Path, manifest: Manifest, output: Path, decode: bool, progress: Callable[[int], object]) -> int:
    """Write the index without its broken samples to the new folder ``output``, and return how many were left out.

    Raises ValueError if ``output`` exists, or if planning columns or a table of offsets are damaged: these shards must be built again.
    """
    if output.exists():
        raise ValueError(f"--fix {output} exists; give a new folder")
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    skipped = (index / SKIPPED).read_text() if (index / SKIPPED).is_file() else ""
    datasets, left_out = [], 0
    for dataset in manifest.datasets:
        copies = []
        for shard in dataset.shards:
            broken = _broken_rows(index, manifest, dataset, shard, decode)
            copies.append(_copy(index, partial, dataset, shard, broken))
            skipped += "".join(_skipped_lines(index, dataset, shard, broken))
            left_out += len(broken)
            progress(shard.samples)
        datasets.append(_dataset(dataset, copies))
    empty = [dataset.key for dataset in datasets if not dataset.samples]
    if empty:
        raise ValueError(f"dataset {empty[0]} has no sample without a problem; build the index again")
    key = (
        hashlib.sha256(f"{manifest.build_key} without {left_out}: {skipped}".encode()).hexdigest()[:32] if left_out else manifest.build_key
    )
    (partial / SKIPPED).write_text(skipped)
    clean = dataclasses.replace(manifest, datasets=datasets, build_key=key, inputs_key=None if left_out else manifest.inputs_key)
    write_whole(partial / MANIFEST, clean.to_json())
    partial.rename(output)
    return left_out


def _broken_rows(index: Path, manifest: Manifest, dataset: DatasetInfo, shard: ShardInfo, decode: bool) -> dict[int, str]:
    """Return the first problem of every row that has one."""
    broken: dict[int, str] = {}
    for row, problem in sample_problems(index, manifest, dataset, shard, decode):
        broken.setdefault(row, problem)
    return broken


def _copy(index: Path, output: Path, dataset: DatasetInfo, shard: ShardInfo, broken: Mapping[int, str]) -> ShardInfo:
    """Write one shard without its broken rows, and return its description."""
    source, target = (dataset_folder(root, dataset.group, dataset.name) for root in (index, output))
    target.mkdir(parents=True, exist_ok=True)
    data, stem = Shard(source, shard), target / shard.name
    batch = read_planning_batch(source / f"{shard.name}.arrow")
    kept = [row for row in range(shard.samples) if row not in broken]
    builder = IndexedDatasetBuilder(f"{stem}.bin", dtype=np.uint8, multimodal=True)
    checksums: list[int] = []
    for row in kept:
        texts, images = len(data.text_tokens[row]), len(data.width[row])
        first = int(data.text_tokens.offsets[row]) + int(data.width.offsets[row])
        parts = [data.sequences.read(first + number).tobytes() for number in range(texts + images)]
        modes = [TEXT_MODE] * texts + [IMAGE_MODE] * images
        builder.add_document(np.frombuffer(b"".join(parts), dtype=np.uint8), [len(part) for part in parts], modes)
        checksums += map(zlib.crc32, parts)
    builder.finalize(f"{stem}.idx")
    write_checksums(stem, checksums)
    clean = batch.take(pa.array(kept, pa.int64()))
    write_planning_batch(Path(f"{stem}.arrow"), clean)
    sources = np.bincount(data.source_file[kept]) if kept else np.zeros(0, dtype=np.int64)
    reasons = dict(shard.skipped)
    for problem in broken.values():
        reasons[short_reason(problem)] = reasons.get(short_reason(problem), 0) + 1
    return dataclasses.replace(
        shard,
        samples=len(kept),
        texts=int(sum(len(data.text_tokens[row]) for row in kept)),
        images=int(sum(len(data.width[row]) for row in kept)),
        tokens=int(sum(int(data.text_tokens[row].sum()) for row in kept)),
        skipped=reasons,
        files={suffix: (file.size, file.sha256) for suffix in SHARD_FILES for file in [digest(Path(f"{stem}.{suffix}"))]},
        samples_per_source={str(number): int(count) for number, count in enumerate(sources) if count},
        arrow_crc32=crc32(Path(f"{stem}.arrow")),
    )


def _skipped_lines(index: Path, dataset: DatasetInfo, shard: ShardInfo, broken: Mapping[int, str]) -> list[str]:
    data = Shard(dataset_folder(index, dataset.group, dataset.name), shard)
    return [
        skipped_line(dataset.group, dataset.name, dataset.sources[int(data.source_file[row])].path, int(data.source_row[row]), problem)
        for row, problem in broken.items()
    ]


def _dataset(dataset: DatasetInfo, shards: list[ShardInfo]) -> DatasetInfo:
    counts = [sum(shard.samples_per_source.get(str(number), 0) for shard in shards) for number in range(len(dataset.sources))]
    sources: list[SourceInfo] = [dataclasses.replace(source, samples=n) for source, n in zip(dataset.sources, counts, strict=True)]
    skipped = dict(dataset.skipped)
    for old, new in zip(dataset.shards, shards, strict=True):
        for reason, count in new.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count - old.skipped.get(reason, 0)
    return dataclasses.replace(dataset, sources=sources, shards=shards, skipped={reason: n for reason, n in skipped.items() if n})
