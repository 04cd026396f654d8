# SPDX-License-Identifier: Apache-2.0
"""What a latent cache belongs to: the bytes of an index, the image transforms, the autoencoder, and the type of its numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_bagel.common.json_files import as_stored
from megatron_bagel.data.index.format import DatasetInfo, Manifest
from megatron_bagel.data.sources.dataset_config import GroupConfig

CACHE_VERSION = 1


def cache_key(manifest: Manifest, groups: Sequence[GroupConfig], dtype: str, autoencoder: str) -> dict[str, Any]:
    """Return the properties that a cache must share with an index, a dataset config and an autoencoder (its sha256).

    ``contents`` identifies the bytes of each dataset of the cache, so that an index built again from the same bytes is the same index.
    """
    transforms = {
        group.name: dataclasses.asdict(group.image_transform)
        for group in groups
        if group.makes_images and group.image_transform is not None
    }
    key = {"schema_version": CACHE_VERSION, "index": manifest.build_key, "dtype": dtype, "autoencoder": autoencoder}
    names = {f"{group.name}/{entry.name}" for group in groups if group.makes_images for entry in group.datasets}
    contents = {dataset.key: _content_key(dataset) for dataset in manifest.datasets if dataset.key in names}
    return as_stored({**key, "transforms": transforms, "contents": contents})


def _content_key(dataset: DatasetInfo) -> str:
    content = [[shard.name, shard.images, shard.files["bin"][1], shard.files["idx"][1]] for shard in dataset.shards]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def key_difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Return what a cache of the key ``stored`` was made for that differs from ``expected``, or None if it serves."""
    if stored.get("schema_version") != expected["schema_version"]:
        return "another version"
    contents = stored.get("contents", {})
    if stored.get("index") != expected["index"] and any(contents.get(name) != key for name, key in expected["contents"].items()):
        return "another index"
    for group, transform in expected["transforms"].items():
        stored_transform = stored["transforms"].get(group)
        if stored_transform != transform:
            return f"other image_transform_args of group {group} ({stored_transform}, now {transform})"
    if stored["dtype"] != expected["dtype"]:
        return f"another --dtype ({stored['dtype']})"
    return None if stored["autoencoder"] == expected["autoencoder"] else "another autoencoder"
