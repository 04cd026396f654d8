# SPDX-License-Identifier: Apache-2.0
"""The autoencoder's posterior of every training image, stored once beside the index, so that a run encodes no images.

    LATENTS/latents.json                        what it belongs to: index, transforms, autoencoder, files; written last
    LATENTS/ae_config.json                      the autoencoder's architecture, as beside its weights
    LATENTS/<group>/<dataset>/00000.crc         CRC-32 of every posterior; caches of earlier versions have none
    LATENTS/<group>/<dataset>/00000.bin .idx    per image of the index's shard 00000, in its order: mean and log variance
                                                [2, z, height / downsample, width / downsample] of the transformed image

The cache holds posteriors instead of latents, because training samples the posterior again in every epoch, as the original does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bagel.common.dtypes import LONG
from megatron_bagel.common.files import crc32
from megatron_bagel.common.finite import is_finite
from megatron_bagel.common.json_files import read_json
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.data.index.format import Manifest
from megatron_bagel.data.index.latent_key import cache_key, key_difference
from megatron_bagel.data.index.reader import DatasetReader
from megatron_bagel.data.index.sequences import OPENING, StoredSequences, checked_size
from megatron_bagel.data.sources.dataset_config import GroupConfig

CACHE_MANIFEST = "latents.json"
CACHE_FILES = ("bin", "idx", "crc")  # caches of earlier versions lack the last one
DTYPES = LONG


class LatentCache:
    """An opened cache. It can be pickled and forked; every process maps the files separately."""

    def __init__(self, folder: str | Path, manifest: Manifest, groups: Sequence[GroupConfig], check_all: bool = False) -> None:
        """Open the cache; ``check_all`` compares the checksum of every posterior that is read.

        Raises ValueError if ``folder`` holds no complete cache, or one of another index or other image sizes.
        """
        self.folder = Path(folder)
        stored = read_cache_manifest(self.folder)
        difference = key_difference(stored, cache_key(manifest, groups, stored["dtype"], stored["autoencoder"]))
        if difference:
            raise ValueError(
                f"--latent_cache {folder} was made for {difference}; run data_tools/cache_latents.py for this index and dataset config"
            )
        self.dtype = DTYPES[stored["dtype"]]
        self.arch = AutoencoderArch.beside(self.folder / CACHE_MANIFEST)
        self._files: Mapping[str, Mapping[str, Any]] = stored["files"]
        self._check_all = check_all
        self._shards: dict[str, StoredSequences] = {}  # shards that were opened and checked

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def posterior(self, reader: DatasetReader, index: int, image: int, grid: tuple[int, int]) -> torch.Tensor:
        """Return mean and log variance of one image of row ``index``, float32 [2 * z, height, width].

        ``grid`` is the (height, width) of its latent. Raises ValueError if the stored posterior has another size, or if it holds NaN or
        infinite values.
        """
        shard, number = reader.image_number_in_shard(index, image)
        with OPENING:
            data = np.array(self._shard(reader, shard).read(number))
        shape = (2 * self.arch.z_channels, *grid)
        if len(data) != math.prod(shape) * self.dtype.itemsize:
            raise ValueError(f"the stored posterior has {len(data)} bytes, not {shape}; make the cache {self.folder} again")
        values = torch.from_numpy(data).view(self.dtype).view(shape).to(torch.float32)
        if not is_finite(values):
            raise ValueError(f"the stored posterior holds NaN or infinite values; make the cache {self.folder} again")
        return values

    def _shard(self, reader: DatasetReader, name: str) -> StoredSequences:
        label = f"{reader.name}/{name}"
        if label not in self._shards:
            images = next(shard.images for shard in reader.info.shards if shard.name == name)
            self._shards[label] = open_cached_shard(self.folder, label, self._files, images, self._check_all)
        return self._shards[label]


def read_cache_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of ``latents.json``. Raises ValueError naming the file if it is missing or damaged."""
    path = folder / CACHE_MANIFEST
    if not path.is_file():
        raise ValueError(f"--latent_cache {folder} is not complete: it has no {CACHE_MANIFEST}; run data_tools/cache_latents.py")
    stored = read_json(path, "--latent_cache")
    kinds = {"schema_version": int, "index": str, "dtype": str, "autoencoder": str, "transforms": dict, "files": dict}
    wrong_keys = [name for name, kind in kinds.items() if not isinstance(stored.get(name), kind)]
    if wrong_keys or stored["dtype"] not in DTYPES:
        raise ValueError(f"{path} is damaged ({', '.join(wrong_keys) or 'dtype'}); run data_tools/cache_latents.py to make the cache again")
    return stored


def open_cached_shard(
    folder: Path, label: str, files: Mapping[str, Mapping[str, Any]], images: int, check_all: bool = False
) -> StoredSequences:
    """Open one shard of a cache after checking its small files.

    Args:
        folder: The folder of the cache.
        label: ``group/dataset/shard``.
        files: The entry ``files`` of its manifest.
        images: How many images the shard has.
        check_all: See ``StoredSequences``.

    Raises:
        ValueError: A file is missing or damaged; the message names it.
    """
    stem, recorded, remedy = folder / label, files.get(label), "copy or make the cache again"
    if not isinstance(recorded, Mapping):
        raise ValueError(f"{folder / CACHE_MANIFEST} does not list {label}; {remedy}")
    for ending in (ending for ending in CACHE_FILES if ending in recorded):
        checked_size(stem, ending, recorded[ending], remedy)
    for ending, recorded_crc in recorded.get("crc32", {}).items():
        if crc32(Path(f"{stem}.{ending}")) != recorded_crc:
            raise ValueError(f"{stem}.{ending} does not have the checksum it was written with; {remedy}")
    return StoredSequences.open(stem, images, False, "crc" in recorded, check_all)


def cached_files(stem: Path) -> dict[str, Any]:
    """Return what the manifest records of a finished shard: the sizes of its files, and the CRC-32 of the small ones."""
    sizes: dict[str, Any] = {ending: Path(f"{stem}.{ending}").stat().st_size for ending in CACHE_FILES}
    return {**sizes, "crc32": {ending: crc32(Path(f"{stem}.{ending}")) for ending in ("idx", "crc")}}
