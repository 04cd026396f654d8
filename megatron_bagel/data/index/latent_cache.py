"""The autoencoder's posterior of every training image, stored once beside the index, so that a run encodes no images.

    LATENTS/latents.json                        what it belongs to: index, transforms, autoencoder, files; written last
    LATENTS/ae_config.json                      the autoencoder's architecture, as beside its weights
    LATENTS/<group>/<dataset>/00000.bin .idx    per image of the index's shard 00000, in its order: mean and log variance
                                                [2, z, height / downsample, width / downsample] of the transformed image

The cache holds posteriors instead of latents, because training samples the posterior again in every epoch, as the original does.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bagel.common.dtypes import LONG
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.data.index.format import Manifest, dataset_folder
from megatron_bagel.data.index.reader import OPENING, DatasetReader, open_indexed
from megatron_bagel.data.sources.dataset_config import GroupConfig

CACHE_VERSION = 1
CACHE_MANIFEST = "latents.json"
DTYPES = LONG


def cache_key(manifest: Manifest, groups: Sequence[GroupConfig], dtype: str, autoencoder: str) -> dict[str, Any]:
    """Return the properties that a cache must share with an index, a dataset config and an autoencoder (its sha256)."""
    transforms = {
        group.name: dataclasses.asdict(group.image_transform)
        for group in groups
        if group.makes_images and group.image_transform is not None
    }
    key = {"schema_version": CACHE_VERSION, "index": manifest.build_key, "dtype": dtype, "autoencoder": autoencoder}
    return json.loads(json.dumps({**key, "transforms": transforms}))


class LatentCache:
    """An opened cache. It can be pickled and forked; every process maps the files separately."""

    def __init__(self, folder: str | Path, manifest: Manifest, groups: Sequence[GroupConfig]) -> None:
        """Open the cache. Raises ValueError if ``folder`` holds no complete cache, or one of another index or other image sizes."""
        self.folder = Path(folder)
        path = self.folder / CACHE_MANIFEST
        if not path.is_file():
            raise ValueError(f"--latent_cache {folder} is not complete: it has no {CACHE_MANIFEST}; run data_tools/cache_latents.py")
        stored = json.loads(path.read_text())
        expected = cache_key(manifest, groups, stored["dtype"], stored["autoencoder"])
        for name, description in (("schema_version", "version"), ("index", "index")):
            if stored[name] != expected[name]:
                raise ValueError(
                    f"--latent_cache {folder} was made for another {description}; run data_tools/cache_latents.py for this one"
                )
        for group, transform in expected["transforms"].items():
            if stored["transforms"].get(group) != transform:
                raise ValueError(
                    f"--latent_cache {folder} was made with other image_transform_args of group {group} "
                    f"({stored['transforms'].get(group)}, now {transform}); run data_tools/cache_latents.py with this dataset config"
                )
        self.dtype = DTYPES[stored["dtype"]]
        self.arch = AutoencoderArch.beside(self.folder / CACHE_MANIFEST)
        self._files: Mapping[str, Mapping[str, int]] = stored["files"]
        self._stems: dict[Path, int] = {}  # shards already checked, and the modification time of their .bin

    def posterior(self, reader: DatasetReader, index: int, image: int, grid: tuple[int, int]) -> torch.Tensor:
        """Return mean and log variance of one image of row ``index``, float32 [2 * z, height, width].

        ``grid`` is the (height, width) of its latent. Raises ValueError if the stored posterior has another size.
        """
        shard, number = reader.image_number_in_shard(index, image)
        with OPENING:
            data = np.array(open_indexed(*self._stem(reader, shard), False)[number])
        values = torch.from_numpy(data).view(self.dtype)
        shape = (2 * self.arch.z_channels, *grid)
        if values.numel() != shape[0] * shape[1] * shape[2]:
            raise ValueError(f"the stored posterior has {values.numel()} values, not {shape}; make the cache {self.folder} again")
        return values.view(shape).to(torch.float32)

    def _stem(self, reader: DatasetReader, name: str) -> tuple[str, int]:
        stem = dataset_folder(self.folder, reader.info.group, reader.info.name) / name
        if stem not in self._stems:
            size, path = self._files[f"{reader.name}/{name}"]["bin"], Path(f"{stem}.bin")
            stat = path.stat() if path.is_file() else None
            if stat is None or stat.st_size != size:
                actual_size = "no file" if stat is None else stat.st_size
                raise ValueError(f"{path} should have {size} bytes but has {actual_size}; copy or make the cache again")
            self._stems[stem] = stat.st_mtime_ns
        return str(stem), self._stems[stem]
