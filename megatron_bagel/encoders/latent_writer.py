"""Fills a latent cache: every image of the generation groups, transformed as in training, through the autoencoder's encoder.

Shards of the index are written one by one, each complete or not there, so jobs can share the work and a killed one goes on.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_bagel.data.groups import GroupConfig
from megatron_bagel.data.index_format import Manifest, dataset_folder, write_durably
from megatron_bagel.data.index_reader import DatasetReader, IndexedSamples
from megatron_bagel.data.index_verify import file_digest
from megatron_bagel.data.latent_cache import CACHE_MANIFEST, DTYPES, cache_key
from megatron_bagel.data.transforms import decode_rgb, image_tensor, output_size
from megatron_bagel.encoders.autoencoder import AutoEncoder

_BATCH = 64  # images in memory at a time
_KEPT_BYTES = 1 << 28  # of posteriors that are kept in case their picture comes again


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
    key = cache_key(index.manifest, groups, options.dtype, file_digest(weights))
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
    write_durably(output / CACHE_MANIFEST, json.dumps({**key, "files": files}, indent=1) + "\n")
    return True


def total_images(manifest: Manifest, groups: Sequence[GroupConfig]) -> int:
    """Images that a complete cache of these groups holds."""
    names = {f"{group.name}/{entry.name}" for group in groups if group.makes_images for entry in group.datasets}
    return sum(shard.images for dataset in manifest.datasets if dataset.key in names for shard in dataset.shards)


def _prepare(output: Path, key: dict, autoencoder: AutoEncoder) -> None:
    output.mkdir(parents=True, exist_ok=True)
    path = output / "key.json"
    if path.is_file() and json.loads(path.read_text()) != key:
        raise ValueError(
            f"{output} holds latents of another index, autoencoder, dtype or other image transforms; remove it, or give another --output"
        )
    if not path.is_file() and any(output.iterdir()):
        raise ValueError(f"{output} holds something else than a latent cache; give another --output")
    write_durably(path, json.dumps(key))
    write_durably(output / "ae_config.json", json.dumps(autoencoder.arch.to_dict(), indent=1) + "\n")


def _done(output: Path, shard: _ShardWork) -> Path:
    info = shard.reader.info
    return dataset_folder(output, info.group, info.name) / f"{info.shards[shard.number].name}.json"


@torch.no_grad()
def _write_shard(
    output: Path, shard: _ShardWork, autoencoder: AutoEncoder, options: CacheOptions, progress: Callable[[int], None]
) -> None:
    done = _done(output, shard)
    done.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(done.with_suffix(".bin")), dtype=np.uint8, multimodal=False)
    # By digest of the file, so that a picture that comes again is not encoded again; by shard, so that the numbers do not depend on
    # which shards the same job wrote before.
    stored: dict[bytes, torch.Tensor] = {}
    digests: list[bytes] = []
    fresh: dict[bytes, torch.Tensor] = {}

    def encode() -> None:
        stored.update(_posteriors(fresh, autoencoder, options))
        for digest in digests:
            builder.add_document(stored[digest], [len(stored[digest])])
        progress(len(digests))
        digests.clear()
        fresh.clear()
        if sum(len(values) for values in stored.values()) > _KEPT_BYTES:
            stored.clear()

    for row in shard.reader.shard_rows(shard.number):
        for image in range(len(shard.reader.record(row).widths)):
            digest = hashlib.blake2b(shard.reader.image_bytes(row, image)).digest()
            digests.append(digest)
            if digest not in stored and digest not in fresh:
                fresh[digest] = _pixels(shard, row, image)
            if len(digests) == _BATCH:
                encode()
    encode()
    builder.finalize(str(done.with_suffix(".idx")))
    write_durably(done, json.dumps({ending: done.with_suffix(f".{ending}").stat().st_size for ending in ("bin", "idx")}))


def _posteriors(pixels: Mapping[bytes, torch.Tensor], autoencoder: AutoEncoder, options: CacheOptions) -> dict[bytes, torch.Tensor]:
    """The bytes to store of each picture."""
    encoded = autoencoder.encode_many([image.to(options.device) for image in pixels.values()])
    values = [torch.cat(posterior).to("cpu", DTYPES[options.dtype]).contiguous() for posterior in encoded]
    return {digest: each.view(torch.uint8).reshape(-1) for digest, each in zip(pixels, values, strict=True)}


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
