"""Reads every byte of an index and says what is wrong with it, by shard, source file and row: for after a copy, or a doubtful disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_bagel.common.files import digest
from megatron_bagel.data.index.format import SHARD_FILES, DatasetInfo, Manifest, ShardInfo, dataset_folder
from megatron_bagel.data.index.reader import Shard
from megatron_bagel.data.sources.dataset_config import EDIT, T2I
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, forms_per_instruction
from megatron_bagel.data.transforms import decode_rgb


def shard_problems(index: Path, manifest: Manifest, dataset: DatasetInfo, shard: ShardInfo, decode: bool = True) -> Iterator[str]:
    """What is wrong with one shard, a sentence each: files against the manifest, columns against each other and the bytes, token
    ids against the vocabulary, and (``decode``) every image, which must decode to the size that planning uses."""
    folder = dataset_folder(index, dataset.group, dataset.name)
    where = f"{dataset.key}/{shard.name}"
    try:
        data = Shard(folder, shard)
    except (ValueError, OSError) as error:
        yield f"{where}: {error}"
        return
    for ending in SHARD_FILES:
        if digest(folder / f"{shard.name}.{ending}").sha256 != shard.files[ending][1]:
            yield f"{where}: {shard.name}.{ending} does not have the checksum of the manifest; copy or build the index again"
    found = {"samples": len(data.source_row), "texts": len(data.text_tokens.values), "images": len(data.width.values)}
    wrong = {name: count for name, count in found.items() if count != getattr(shard, name)}
    if wrong:
        yield f"{where}: the columns hold {wrong}, the manifest says { ({name: getattr(shard, name) for name in wrong}) }"
        return
    sequence = 0
    for row in range(shard.samples):
        texts, images = len(data.text_tokens[row]), len(data.width[row])
        for problem in _sample_problems(data, row, sequence, dataset.group, manifest.vocabulary_size, decode):
            source = dataset.sources[int(data.source_file[row])].path
            yield f"{where} sample {row} ({source}, row {int(data.source_row[row])}): {problem}"
        sequence += texts + images


def _sample_problems(data: Shard, row: int, sequence: int, group: str, vocabulary: int, decode: bool) -> Iterator[str]:
    tokens, widths, heights = data.text_tokens[row], data.width[row], data.height[row]
    if problem := _structure_problem(group, data.structure[row], len(tokens), len(widths)):
        yield problem
    for text, count in enumerate(tokens):
        stored = data.sequence(sequence + text)
        if len(stored) != 4 * count:
            yield f"text {text} has {len(stored)} bytes for {count} tokens"
        elif count and not 0 <= (ids := stored.view("<i4")).min() <= ids.max() < vocabulary:
            yield f"text {text} has token ids outside the vocabulary of {vocabulary}"
    for image, (width, height) in enumerate(zip(widths.tolist(), heights.tolist(), strict=True)) if decode else ():
        try:
            size = decode_rgb(data.sequence(sequence + len(tokens) + image).data, width * height).size
        except ValueError as error:
            yield f"image {image}: {error}"
            continue
        if size != (width, height):
            yield f"image {image} is {size[0]} x {size[1]}, planned with {width} x {height}"


def _structure_problem(group: str, structure: np.ndarray, texts: int, images: int) -> str | None:
    """A structure column that does not describe its sample's texts and images (records.py)."""
    if group == T2I:
        fits = len(structure) == 0 and texts >= 1 and images == 1
    elif group == EDIT:
        fits = images >= 2 and len(structure) == images - 1 and int(structure.sum()) * forms_per_instruction(images) == texts
    else:
        known = bool(np.isin(structure, np.arange(ANSWER_ITEM + 1)).all())
        fits = known and int((structure == IMAGE_ITEM).sum()) == images and len(structure) == texts + images
    return None if fits else f"structure {structure.tolist()} does not describe {texts} texts and {images} images"
