# SPDX-License-Identifier: Apache-2.0
"""Reads every byte of an index and reports problems by shard, source file and row, after a copy or if a disk is in doubt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_bagel.common.files import digest
from megatron_bagel.data.index.format import DatasetInfo, Manifest, ShardInfo, dataset_folder
from megatron_bagel.data.index.reader import Shard
from megatron_bagel.data.sources.dataset_config import EDIT, INTERLEAVED, T2I, VLM
from megatron_bagel.data.sources.records import forms_per_instruction
from megatron_bagel.data.sources.stored_items import structure_problem
from megatron_bagel.data.sources.stored_videos import conversation_problem, has_video
from megatron_bagel.data.sources.video import video_info
from megatron_bagel.data.transforms import decode_rgb


def shard_problems(index: Path, manifest: Manifest, dataset: DatasetInfo, shard: ShardInfo, decode: bool = True) -> Iterator[str]:
    """Yield a sentence for each problem of one shard.

    The check compares files with the manifest, columns with each other and with the bytes, and token ids with the vocabulary. With
    ``decode`` every image must decode to the size that planning uses.
    """
    folder = dataset_folder(index, dataset.group, dataset.name)
    label = f"{dataset.key}/{shard.name}"
    for suffix, (_, recorded_sum) in shard.files.items():
        path = folder / f"{shard.name}.{suffix}"
        if path.is_file() and digest(path).sha256 != recorded_sum:
            yield f"{label}: {shard.name}.{suffix} does not have the checksum of the manifest; copy or build the index again"
    try:
        data = Shard(folder, shard, check_all=True)
        _ = data.sequences
    except (ValueError, OSError) as error:
        yield f"{label}: {error}"
        return
    actual_counts = {"samples": len(data.source_row), "texts": len(data.text_tokens.values), "images": len(data.width.values)}
    differing = {name: count for name, count in actual_counts.items() if count != getattr(shard, name)}
    if differing:
        yield f"{label}: the columns hold {differing}, the manifest says { ({name: getattr(shard, name) for name in differing}) }"
        return
    for row, problem in _row_problems(data, dataset, shard, manifest, decode):
        source = dataset.sources[int(data.source_file[row])].path
        yield f"{label} sample {row} ({source}, row {int(data.source_row[row])}): {problem}"


def sample_problems(index: Path, manifest: Manifest, dataset: DatasetInfo, shard: ShardInfo, decode: bool) -> Iterator[tuple[int, str]]:
    """Yield (row of the shard, problem) of its samples.

    Raises ValueError or OSError if the planning columns or the table of offsets are damaged.
    """
    data = Shard(dataset_folder(index, dataset.group, dataset.name), shard, check_all=True)
    _ = data.sequences
    yield from _row_problems(data, dataset, shard, manifest, decode)


def _row_problems(data: Shard, dataset: DatasetInfo, shard: ShardInfo, manifest: Manifest, decode: bool) -> Iterator[tuple[int, str]]:
    sequence = 0
    for row in range(shard.samples):
        for problem in _sample_problems(data, row, sequence, dataset.group, manifest, decode):
            yield row, problem
        sequence += len(data.text_tokens[row]) + len(data.width[row])


def _sample_problems(data: Shard, row: int, sequence: int, group: str, manifest: Manifest, decode: bool) -> Iterator[str]:
    vocabulary = manifest.vocabulary_size
    is_video = group == VLM and has_video(data.structure[row])
    tokens, widths, heights = data.text_tokens[row], data.width[row], data.height[row]
    if problem := _structure_problem(group, data.structure[row], len(tokens), len(widths)):
        yield problem
    for text, count in enumerate(tokens):
        try:
            stored_bytes = data.sequences.read(sequence + text)
        except ValueError as error:
            yield f"text {text}: {error}"
            continue
        if len(stored_bytes) != 4 * count:
            yield f"text {text} has {len(stored_bytes)} bytes for {count} tokens"
        elif count and not 0 <= (ids := stored_bytes.view("<i4")).min() <= ids.max() < vocabulary:
            yield f"text {text} has token ids outside the vocabulary of {vocabulary}"
    for image, (width, height) in enumerate(zip(widths.tolist(), heights.tolist(), strict=True)) if decode else ():
        try:
            content = data.sequences.read(sequence + len(tokens) + image)
            size = video_info(content.tobytes())[2:] if is_video else decode_rgb(content.data, width * height, manifest.exif).size
        except ValueError as error:
            yield f"image {image}: {error}"
            continue
        if size != (width, height):
            yield f"image {image} is {size[0]} x {size[1]}, planned with {width} x {height}"


def _structure_problem(group: str, structure: np.ndarray, texts: int, images: int) -> str | None:
    """Return a sentence if a structure column does not describe its sample's texts and images (records.py), else None."""
    if group == INTERLEAVED:
        return structure_problem(structure, texts, images)
    if group == T2I:
        is_consistent = len(structure) == 0 and texts >= 1 and images == 1
    elif group == EDIT:
        is_consistent = images >= 2 and len(structure) == images - 1 and int(structure.sum()) * forms_per_instruction(images) == texts
    else:
        is_consistent = not conversation_problem(structure, texts, images)
    return None if is_consistent else f"structure {structure.tolist()} does not describe {texts} texts and {images} images"
