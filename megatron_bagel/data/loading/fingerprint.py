# SPDX-License-Identifier: Apache-2.0
"""What identifies the data of a run: the datasets of every group in their order, the content of their index, and the group's settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from megatron_bagel.common.json_files import as_stored
from megatron_bagel.data.index.format import DatasetInfo, Manifest
from megatron_bagel.data.loading.pack_reader import ReadableSource
from megatron_bagel.data.planner.group_source import GroupSource
from megatron_bagel.data.sources.dataset_config import DatasetEntry, GroupConfig
from megatron_bagel.data.sources.files import absolute, last_parts

#: Settings of a group that say where its data are, or that are described otherwise.
_DESCRIBED_APART = ("name", "datasets", "resume_data_status")
#: Settings that checkpoints of earlier versions do not have, with the value that leaves everything as it was then.
LATER_DEFAULTS: dict[str, Any] = {"share_max_pixels": False, "weight_points": (), "dataset_weights": (), "max_epochs": (), "part": ""}


def data_fingerprint(sources: Sequence[ReadableSource]) -> dict[str, Any]:
    """Return, for every group of an index, its datasets as [name, rows, digest] in their order, and its settings; JSON values only."""
    groups = {}
    for source in sources:
        if not isinstance(source, GroupSource):
            continue
        rows = source.datasets()
        datasets = [[reader.name, len(rows[reader.name]), dataset_digest(reader.info)] for reader in source.readers()]
        settings = {name: value for name, value in dataclasses.asdict(source.group).items() if name not in _DESCRIBED_APART}
        settings = {name: value for name, value in settings.items() if name not in LATER_DEFAULTS or value != LATER_DEFAULTS[name]}
        groups[source.name] = {"datasets": datasets, "settings": settings}
    return as_stored(groups)


def dataset_digest(info: DatasetInfo) -> str:
    """Return a digest of what the index holds of a dataset: the checksums of its shards in their order."""
    content = [[shard.name, sorted(shard.files.items())] for shard in info.shards]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def other_sources(manifest: Manifest, groups: Sequence[GroupConfig]) -> list[str]:
    """Return a sentence for each dataset whose index was built from other files than the dataset config names.

    Paths are compared by their last two parts, because datasets move between machines. Files are not opened.
    """
    built = {dataset.key: dataset for dataset in manifest.datasets}
    sentences = []
    for group in groups:
        for entry in group.datasets:
            info, location = built.get(f"{group.name}/{entry.name}"), _location(entry)
            if info is None or not location or not info.sources:
                continue
            strangers = [source.path for source in info.sources if not _is_below(source.path, location)]
            if strangers:
                sentences.append(
                    f"dataset {info.key}: the index was built from {strangers[0]}, and the dataset config names {location}; the run trains "
                    "on what the index holds"
                )
    return sentences


def _location(entry: DatasetEntry) -> str:
    location = entry.location.jsonl_path or entry.location.data_dir or ""
    return absolute(location) if location else ""


def _is_below(path: str, location: str) -> bool:
    if path == location or path.startswith(location.rstrip("/") + "/"):
        return True
    tail = tuple(last_parts(location))
    parts = PurePosixPath(path).parts
    return any(parts[start : start + len(tail)] == tail for start in range(len(parts)))
