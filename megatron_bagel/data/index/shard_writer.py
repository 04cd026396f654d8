# SPDX-License-Identifier: Apache-2.0
"""Writes one shard of the index in a worker process: reads its source rows, checks images, tokenises texts."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_bagel.common.files import crc32, digest, write_whole
from megatron_bagel.data.index.format import (
    IMAGE_MODE,
    PLANNING_SCHEMA,
    SHARD_FILES,
    TEXT_MODE,
    ShardInfo,
    dataset_folder,
)
from megatron_bagel.data.index.plan import ImageChecks, ShardPlan
from megatron_bagel.data.index.publish import INDEX, STATE, short_reason, skipped_line
from megatron_bagel.data.index.sequences import write_checksums
from megatron_bagel.data.index.source_contents import source_checksums
from megatron_bagel.data.index.write_arrow import write_planning_batch
from megatron_bagel.data.sources.dataset_config import INTERLEAVED, TEXT, VLM
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, BadRow, RawSample, bad_row
from megatron_bagel.data.sources.rows import read_unit
from megatron_bagel.data.sources.stored_items import LOSS, stored_items
from megatron_bagel.data.sources.stored_items import TEXT as TEXT_KIND
from megatron_bagel.data.sources.stored_videos import VIDEO_ITEM, conversation_items
from megatron_bagel.data.sources.video import video_info
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.data.transforms import complete_size, decoded_size, header_size


class _Columns:
    """Planning columns of the samples written so far."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {name: [] for name in PLANNING_SCHEMA.names}

    def add(self, sample: RawSample, tokens: list[int], sizes: Sequence[tuple[int, int]], source: int, row: int) -> None:
        values = (tokens, sample.structure, [w for w, _ in sizes], [h for _, h in sizes], source, row)
        for column, value in zip(self.rows.values(), values, strict=True):
            column.append(value)

    def write(self, path: Path) -> None:
        write_planning_batch(path, pa.RecordBatch.from_pydict(self.rows, schema=PLANNING_SCHEMA))


def image_size(data: bytes, checks: ImageChecks) -> tuple[int, int]:
    """Return the (width, height) in pixels of an encoded image. Raises BadRow if ``checks`` find it corrupt or too large."""
    try:
        if checks.depth == "header":
            return header_size(data, checks.max_pixels, checks.exif)
        return (decoded_size if checks.depth == "decode" else complete_size)(data, checks.max_pixels, checks.exif)
    except ValueError as error:
        raise BadRow(f"corrupt image: {error}") from error


def write_shard(build: Path, plan: ShardPlan, tokenizer: Tokenizer, progress: Callable[[int], object]) -> ShardInfo:
    """Write the shard's files into a build folder (publish.py). The description is written last and marks the shard as complete.

    ``progress`` receives row counts. Raises ValueError if the files cannot be written, for example because the disk is full.
    """
    try:
        return _write_shard(build, plan, tokenizer, progress)
    except OSError as error:
        raise ValueError(
            f"shard {plan.group}/{plan.dataset}/{plan.name} cannot be written to {build} ({error.strerror or error}); fix the cause and "
            "run the same command again: finished shards are kept"
        ) from error


def _write_shard(build: Path, plan: ShardPlan, tokenizer: Tokenizer, progress: Callable[[int], object]) -> ShardInfo:
    folder, state = (dataset_folder(build / kind, plan.group, plan.dataset) for kind in (INDEX, STATE))
    for path in (folder, state):
        path.mkdir(parents=True, exist_ok=True)
    stem = folder / plan.name
    builder = IndexedDatasetBuilder(f"{stem}.bin", dtype=np.uint8, multimodal=True)
    columns = _Columns()
    checksums: list[int] = []
    skipped: Counter[str] = Counter()
    per_source: Counter[str] = Counter()
    counts: Counter[str] = Counter(samples=0, texts=0, images=0, tokens=0)
    with open(state / f"{plan.name}.skipped.jsonl", "w") as skipped_rows:
        for unit in plan.units:
            for row, sample in read_unit(unit):
                try:
                    if isinstance(sample, BadRow):
                        raise sample
                    sizes, ids = measure(sample, plan.group, plan.checks, tokenizer)
                except BadRow as error:
                    skipped[short_reason(str(error))] += 1
                    skipped_rows.write(skipped_line(plan.group, plan.dataset, unit.path, row, str(error)))
                    continue
                except MemoryError as error:
                    raise ValueError(
                        f"{unit.path}, row {row}: memory ran out while the row was read; use fewer worker processes"
                    ) from error
                finally:
                    progress(1)
                _add_sample(builder, checksums, ids, sample.images)
                columns.add(sample, [len(i) for i in ids], sizes, unit.source, row)
                per_source[str(unit.source)] += 1
                counts.update(samples=1, texts=len(ids), images=len(sizes), tokens=sum(map(len, ids)))
    builder.finalize(f"{stem}.idx")
    write_checksums(stem, checksums)
    columns.write(Path(f"{stem}.arrow"))
    files = {suffix: _checksum(Path(f"{stem}.{suffix}")) for suffix in SHARD_FILES}
    info = ShardInfo(
        plan.name,
        **counts,
        skipped=dict(skipped),
        files=files,
        samples_per_source=dict(per_source),
        arrow_crc32=crc32(Path(f"{stem}.arrow")),
        source_checksums=source_checksums(plan.units),
    )
    write_whole(state / f"{plan.name}.json", json.dumps(dataclasses.asdict(info)))
    return info


def measure(sample: RawSample, group: str, checks: ImageChecks, tokenizer: Tokenizer) -> tuple[list[tuple[int, int]], list[np.ndarray]]:
    """Return the sizes of a sample's images and the ids of its texts. Raises BadRow whatever a decoder or a tokenizer raises."""
    try:
        sizes = _stored_video_size(sample) if _holds_video(sample, group) else [image_size(image, checks) for image in sample.images]
        ids = [np.asarray(tokenizer.encode(text), dtype="<i4") for text in sample.texts]
    except MemoryError:
        raise
    except Exception as error:  # decoders and tokenizers are plugins of other packages
        raise bad_row(error) from error
    empty = {text for text, tokens in enumerate(ids) if not len(tokens)}
    if empty and not empty.isdisjoint(_learned_texts(sample, group)):
        raise BadRow("an answer without tokens, which would teach the model to stop at once")
    return sizes, ids


def _holds_video(sample: RawSample, group: str) -> bool:
    return group == VLM and VIDEO_ITEM in sample.structure


def _stored_video_size(sample: RawSample) -> list[tuple[int, int]]:
    """Return the size of the frames of a sample's video, its only image."""
    info = video_info(sample.images[0])
    return [(info.width, info.height)]


def _learned_texts(sample: RawSample, group: str) -> list[int]:
    """Return the numbers of the texts with a loss."""
    if group == INTERLEAVED:
        texts = [item for item in stored_items(sample.structure) if item.kind == TEXT_KIND for _ in range(item.count)]
        return [text for text, item in enumerate(texts) if item.has(LOSS)]
    found = conversation_items(np.array(sample.structure)) if group in (VLM, TEXT) else ()
    codes = [code for code, _, _ in found if code not in (IMAGE_ITEM, VIDEO_ITEM)]
    return [text for text, code in enumerate(codes) if code == ANSWER_ITEM]


def _add_sample(builder: IndexedDatasetBuilder, checksums: list[int], ids: list[np.ndarray], images: list[bytes]) -> None:
    parts = [i.tobytes() for i in ids] + images
    modes = [TEXT_MODE] * len(ids) + [IMAGE_MODE] * len(images)
    builder.add_document(np.frombuffer(b"".join(parts), dtype=np.uint8), [len(part) for part in parts], modes)
    checksums += map(zlib.crc32, parts)


def _checksum(path: Path) -> tuple[int, str]:
    """Flush a file to disk and return its (bytes, sha256)."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    return digest(path)
