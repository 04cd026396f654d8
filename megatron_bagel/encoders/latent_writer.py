"""Fills a latent cache: every image of the generation groups, transformed as in training, through the autoencoder's encoder.

Shards of the index are written one by one, each complete or not there, so jobs can share the work and a killed one goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_bagel.common.files import digest, write_whole
from megatron_bagel.data.index.format import Manifest, dataset_folder
from megatron_bagel.data.index.latent_cache import CACHE_MANIFEST, DTYPES, cache_key
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.transforms import decode_rgb, image_tensor, output_size
from megatron_bagel.encoders.autoencoder import AutoEncoder

_BATCH = 64  # images in memory at a time
_WRITTEN = 1024  # images at most between two writes, where most are known already
_REMEMBERED = 256 << 20  # bytes of posteriors kept: equal pictures of a shard (the same one with many captions) are encoded once


@dataclass(frozen=True)
class CacheOptions:
    """``dtype`` of the stored numbers: "float32" trains with the losses of encoding, "bfloat16" takes half the room. Of ``num_jobs``
    jobs this one, ``job_index``, writes its share of the shards."""

    dtype: str = "float32"
    device: torch.device | str = "cpu"
    num_jobs: int = 1
    job_index: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0 <= self.job_index < self.num_jobs:
            raise ValueError(f"--job-index counts from 0 to --num-jobs - 1, got index {self.job_index} of {self.num_jobs} jobs")


@dataclass(frozen=True)
class _ShardWork:
    reader: DatasetReader
    group: GroupConfig
    number: int

    @property
    def name(self) -> str:
        return f"{self.reader.name}/{self.reader.info.shards[self.number].name}"


def write_latent_cache(
    index: IndexedSamples, groups: Sequence[GroupConfig], weights: Path, autoencoder: AutoEncoder, output: Path, options: CacheOptions,
    progress: Callable[[int], None] = lambda _: None,
) -> bool:  # fmt: skip
    """Write this job's shards of the cache at ``output``; whether the cache is complete now. ``progress`` gets numbers of images.

    The job that finishes last writes the manifest. Raises ValueError when ``output`` holds the cache of something else.
    """
    key = cache_key(index.manifest, groups, options.dtype, digest(weights).sha256)
    _prepare(output, key, autoencoder)
    work = [
        _ShardWork(index.reader(group, entry), group, number)
        for group in groups if group.makes_images
        for entry in group.datasets for number in range(len(index.reader(group, entry).info.shards))
    ]  # fmt: skip
    for shard in work[options.job_index :: options.num_jobs]:
        if not _done(output, shard).is_file():
            _write_shard(output, shard, autoencoder, options, progress)
    if not all(_done(output, shard).is_file() for shard in work):
        return False
    files = {shard.name: json.loads(_done(output, shard).read_text()) for shard in work}
    write_whole(output / CACHE_MANIFEST, json.dumps({**key, "files": files}, indent=1) + "\n")
    return True


def total_images(manifest: Manifest, groups: Sequence[GroupConfig]) -> int:
    """Images that a complete cache of these groups holds."""
    names = {f"{group.name}/{entry.name}" for group in groups if group.makes_images for entry in group.datasets}
    return sum(shard.images for dataset in manifest.datasets if dataset.key in names for shard in dataset.shards)


def _prepare(output: Path, key: dict, autoencoder: AutoEncoder) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "key.json"
    # Jobs may start at the same moment: what another one is about to call key.json is nothing else than a cache.
    there = {file.name for file in output.iterdir() if not file.name.startswith(f"{path.name}.partial")}
    if path.name in there and json.loads(path.read_text()) != key:
        raise ValueError(
            f"{output} holds latents of another index, autoencoder, dtype or other image transforms; remove it, or give another --output"
        )
    if there and path.name not in there:
        raise ValueError(f"{output} holds something else than a latent cache; give another --output")
    write_whole(path, json.dumps(key))
    write_whole(output / "ae_config.json", json.dumps(autoencoder.arch.to_dict(), indent=1) + "\n")


def _done(output: Path, shard: _ShardWork) -> Path:
    info = shard.reader.info
    return dataset_folder(output, info.group, info.name) / f"{info.shards[shard.number].name}.json"


class _Writer:
    """Encodes and writes images in order. Equal pictures (one with many captions, say) are decoded and encoded once, as far as
    the posteriors of the last ones are remembered."""

    def __init__(self, builder: IndexedDatasetBuilder, autoencoder: AutoEncoder, options: CacheOptions) -> None:
        self._builder, self._autoencoder, self._options = builder, autoencoder, options
        self._order: list[bytes] = []  # hashes of the pictures to be written
        self._pixels: dict[bytes, torch.Tensor] = {}  # those of them to be encoded
        self._stored: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # bytes as written, the ones used last at the end
        self._size = 0

    def add(self, data: bytes, pixels: Callable[[], torch.Tensor]) -> int:
        """The next image, by its encoded bytes; how many were written."""
        name = hashlib.sha256(data).digest()
        self._order.append(name)
        if name not in self._stored and name not in self._pixels:
            self._pixels[name] = pixels()
        return self.flush() if len(self._pixels) == _BATCH or len(self._order) == _WRITTEN else 0

    @torch.no_grad()
    def flush(self) -> int:
        """Write all that was added; how many."""
        moments = self._autoencoder.encode_many([image.to(self._options.device) for image in self._pixels.values()])
        for name, (mean, logvar) in zip(self._pixels, moments, strict=True):
            stored = torch.cat([mean, logvar]).to("cpu", DTYPES[self._options.dtype]).contiguous().view(torch.uint8).reshape(-1)
            self._stored[name] = stored
            self._size += len(stored)
        for name in self._order:
            self._builder.add_document(self._stored[name], [len(self._stored[name])])
            self._stored.move_to_end(name)
        written = len(self._order)
        self._order.clear()
        self._pixels.clear()
        while self._size > _REMEMBERED:
            self._size -= len(self._stored.popitem(last=False)[1])
        return written


def _write_shard(output: Path, shard: _ShardWork, autoencoder: AutoEncoder, options: CacheOptions, progress: Callable[[int], None]) -> None:
    done = _done(output, shard)
    done.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(done.with_suffix(".bin")), dtype=np.uint8, multimodal=False)
    writer = _Writer(builder, autoencoder, options)
    for row in shard.reader.shard_rows(shard.number):
        for image in range(len(shard.reader.record(row).widths)):
            progress(writer.add(shard.reader.image_bytes(row, image), partial(_pixels, shard, row, image)))
    progress(writer.flush())
    builder.finalize(str(done.with_suffix(".idx")))
    write_whole(done, json.dumps({ending: done.with_suffix(f".{ending}").stat().st_size for ending in ("bin", "idx")}))


def _pixels(shard: _ShardWork, row: int, image: int) -> torch.Tensor:
    record, transform = shard.reader.record(row), shard.group.image_transform
    width, height = int(record.widths[image]), int(record.heights[image])
    try:
        decoded = decode_rgb(shard.reader.image_bytes(row, image), width * height)
    except ValueError as error:
        path, line = shard.reader.source(row)
        raise ValueError(f"image {image} of {shard.reader.name} sample {row} ({path}, row {line}) cannot be read: {error}") from error
    return image_tensor(decoded, transform, *output_size(transform, width, height))


def clear_latent_cache(output: Path) -> None:
    """Remove a cache, or nothing where there is none. Raises ValueError when ``output`` is something else."""
    if not output.exists():
        return
    if not (output / "key.json").is_file():
        raise ValueError(f"{output} is no latent cache; remove it yourself, or give another --output")
    shutil.rmtree(output)
