# SPDX-License-Identifier: Apache-2.0
"""Fills a latent cache: encodes every image of the generation groups, transformed as in training, with the autoencoder.

Shards of the index are written one by one. Each is complete or absent, so jobs can share the work and continue after a kill.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_bagel.common.files import digest, is_unfinished, remove_unfinished, write_whole
from megatron_bagel.common.finite import is_finite
from megatron_bagel.common.json_files import read_json
from megatron_bagel.data.index.format import Manifest, dataset_folder
from megatron_bagel.data.index.latent_cache import CACHE_MANIFEST, DTYPES, cached_files
from megatron_bagel.data.index.latent_key import cache_key, key_difference
from megatron_bagel.data.index.reader import DatasetReader, IndexedSamples
from megatron_bagel.data.index.sequences import write_checksums
from megatron_bagel.data.planner.sample_plan import transform_of
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.transforms import image_tensor, output_size
from megatron_bagel.encoders.autoencoder import AutoEncoder

_BATCH = 64  # images in memory at a time
_MAX_PENDING = 1024  # images between two writes, if most of them are already encoded
_REMEMBERED_BYTES = 256 << 20  # posteriors kept in memory, so that equal pictures of a shard (one with many captions) are encoded once


@dataclass(frozen=True)
class CacheOptions:
    """Options of one job that writes a latent cache.

    ``dtype`` is that of the stored numbers: "float32" reproduces the losses of encoding, "bfloat16" takes half the space. This job is
    number ``job_index`` of ``num_jobs`` and writes its share of the shards.
    """

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
class ShardWork:
    """One shard of a cache: the images of shard ``number`` of a dataset of the index."""

    reader: DatasetReader
    group: GroupConfig
    number: int

    @property
    def name(self) -> str:
        """Return ``group/dataset/shard``."""
        return f"{self.reader.name}/{self.reader.info.shards[self.number].name}"


ShardsWriter = Callable[[Sequence[ShardWork]], Iterator[int]]


def write_latent_cache(
    index: IndexedSamples, groups: Sequence[GroupConfig], weights: Path, autoencoder: AutoEncoder, output: Path, options: CacheOptions,
    progress: Callable[[int], object] = lambda _: None, write: ShardsWriter | None = None,
) -> bool:  # fmt: skip
    """Write this job's shards of a latent cache. The job that finishes last writes the manifest.

    Args:
        index: The index of the samples.
        groups: The dataset groups.
        weights: The file of the autoencoder's weights, whose digest is part of the cache's key.
        autoencoder: The autoencoder.
        output: The folder of the cache.
        options: Options of this job.
        progress: Receives the number of images after each write.
        write: Writes the shards and yields the number of images of each; by default this process does.

    Returns:
        Whether the cache is complete now.

    Raises:
        ValueError: If ``output`` holds another cache or something else.
    """
    key = cache_key(index.manifest, groups, options.dtype, digest(weights).sha256)
    _prepare(output, key, autoencoder)
    work = [
        ShardWork(index.reader(group, entry), group, number)
        for group in groups if group.makes_images
        for entry in group.datasets for number in range(len(index.reader(group, entry).info.shards))
    ]  # fmt: skip
    open_work = [shard for shard in work[options.job_index :: options.num_jobs] if not _marker(output, shard).is_file()]
    if write is not None:
        for images in write(open_work):
            progress(images)
    else:
        for shard in open_work:
            write_latent_shard(output, shard, autoencoder, options, progress)
    if not all(_marker(output, shard).is_file() for shard in work):
        return False
    files = {shard.name: read_json(_marker(output, shard), "finished shard") for shard in work}
    remove_unfinished(output)
    write_whole(output / CACHE_MANIFEST, json.dumps({**key, "files": files}, indent=1) + "\n")
    return True


def total_images(manifest: Manifest, groups: Sequence[GroupConfig]) -> int:
    """Return the number of images in a complete cache of these groups."""
    names = {f"{group.name}/{entry.name}" for group in groups if group.makes_images for entry in group.datasets}
    return sum(shard.images for dataset in manifest.datasets if dataset.key in names for shard in dataset.shards)


def _prepare(output: Path, key: dict[str, Any], autoencoder: AutoEncoder) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "key.json"
    # Jobs may start at the same moment, and a killed one may have left its file: another job's unfinished key.json says nothing.
    names = {file.name for file in output.iterdir() if not is_unfinished(file.name)}
    if path.name in names:
        difference = key_difference(read_json(path, "--output"), key)
        if difference:
            raise ValueError(f"{output} holds latents of {difference}; give --overwrite, or remove it or give another --output")
    if names and path.name not in names:
        raise ValueError(f"{output} is not a latent cache; give another --output")
    write_whole(path, json.dumps(key))
    write_whole(output / "ae_config.json", json.dumps(autoencoder.arch.to_dict(), indent=1) + "\n")


def _marker(output: Path, shard: ShardWork) -> Path:
    info = shard.reader.info
    return dataset_folder(output, info.group, info.name) / f"{info.shards[shard.number].name}.json"


class _Writer:
    """Encodes and writes images in order.

    Equal pictures, such as one with many captions, are decoded and encoded once while the posterior is remembered.
    """

    def __init__(self, builder: IndexedDatasetBuilder, autoencoder: AutoEncoder, options: CacheOptions) -> None:
        self._builder, self._autoencoder, self._options = builder, autoencoder, options
        self._order: list[bytes] = []  # hashes of the pictures to write
        self._pixels: dict[bytes, torch.Tensor] = {}  # the ones to encode
        self._labels: dict[bytes, str] = {}  # where they come from, for messages
        self._posteriors: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # bytes as written, most recently used last
        self._stored_bytes = 0
        self.checksums: list[int] = []

    def add(self, data: bytes, pixels: Callable[[], torch.Tensor], label: str) -> int:
        """Add the next image, keyed by its encoded bytes, and return the number of images written.

        ``label`` says where it comes from. Raises ValueError with it if the posterior of an image is not finite.
        """
        name = hashlib.sha256(data).digest()
        self._order.append(name)
        if name not in self._posteriors and name not in self._pixels:
            self._pixels[name], self._labels[name] = pixels(), label
        return self.flush() if len(self._pixels) == _BATCH or len(self._order) == _MAX_PENDING else 0

    @torch.no_grad()
    def flush(self) -> int:
        """Write all added images and return their number."""
        moments = self._autoencoder.encode_many([image.to(self._options.device) for image in self._pixels.values()])
        for name, (mean, logvar) in zip(self._pixels, moments, strict=True):
            values = torch.cat([mean, logvar]).to("cpu", DTYPES[self._options.dtype]).contiguous()
            if not is_finite(values):
                raise ValueError(f"the autoencoder gives NaN or infinite values for {self._labels[name]}; check its weights (--vae)")
            posterior = values.view(torch.uint8).reshape(-1)
            self._posteriors[name] = posterior
            self._stored_bytes += len(posterior)
        for name in self._order:
            self._builder.add_document(self._posteriors[name], [len(self._posteriors[name])])
            self.checksums.append(zlib.crc32(self._posteriors[name].numpy().data))
            self._posteriors.move_to_end(name)
        num_written = len(self._order)
        self._order.clear()
        self._pixels.clear()
        self._labels.clear()
        while self._stored_bytes > _REMEMBERED_BYTES:
            self._stored_bytes -= len(self._posteriors.popitem(last=False)[1])
        return num_written


def write_latent_shard(
    output: Path, shard: ShardWork, autoencoder: AutoEncoder, options: CacheOptions, progress: Callable[[int], object] = lambda _: None
) -> None:
    """Write one shard of a cache below ``output``. The description is written last and marks it as complete."""
    marker = _marker(output, shard)
    marker.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(marker.with_suffix(".bin")), dtype=np.uint8, multimodal=False)
    writer = _Writer(builder, autoencoder, options)
    for row in shard.reader.shard_rows(shard.number):
        for image in range(len(shard.reader.record(row).widths)):
            data = shard.reader.image_bytes(row, image)
            progress(writer.add(data, partial(_pixels, shard, row, image), _label(shard, row, image)))
    progress(writer.flush())
    builder.finalize(str(marker.with_suffix(".idx")))
    write_checksums(marker.with_suffix(""), writer.checksums)
    write_whole(marker, json.dumps(cached_files(marker.with_suffix(""))))


def _pixels(shard: ShardWork, row: int, image: int) -> torch.Tensor:
    record, transform = shard.reader.record(row), transform_of(shard.group, "vae")
    width, height = int(record.widths[image]), int(record.heights[image])
    try:
        decoded = shard.reader.picture(row, image)
    except ValueError as error:
        raise ValueError(f"{_label(shard, row, image)} cannot be read: {error}") from error
    return image_tensor(decoded, transform, *output_size(transform, width, height))


def _label(shard: ShardWork, row: int, image: int) -> str:
    path, line = shard.reader.source(row)
    return f"image {image} of {shard.reader.name} sample {row} ({path}, row {line})"


def clear_latent_cache(output: Path) -> None:
    """Remove a cache if it exists. Raises ValueError when ``output`` is something else."""
    if not output.exists():
        return
    killed_at_once = output.is_dir() and all(is_unfinished(file.name) for file in output.iterdir())
    if not (output / "key.json").is_file() and not killed_at_once:
        raise ValueError(f"{output} is not a latent cache; remove it yourself or give another --output")
    shutil.rmtree(output)
