"""Plans what an index will hold before a byte of it is written: source files in order, cut into shards by their rows alone.

Every job of a build makes the same plan, and therefore the same shards, before it writes its part of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import parse_json
from megatron_bagel.data.index.format import SCHEMA_VERSION
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, VLM, DatasetEntry, GroupConfig
from megatron_bagel.data.sources.files import absolute, is_file, is_folder, is_remote, last_parts, list_files, read_raw, size_and_time
from megatron_bagel.data.sources.rows import BadRow, SourceUnit, check_parquet, scan_jsonl
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.data.transforms import PIXEL_LIMIT

ROWS_PER_SHARD = 20_000
IMAGE_CHECKS = ("structure", "decode", "header")


@dataclass(frozen=True)
class ImageChecks:
    """How closely images are checked.

    ``depth`` is "structure" (complete, checksums right), "decode" (every pixel) or "header" (format and size only). An image of more
    than ``max_pixels`` pixels counts as a decompression bomb.
    """

    depth: str = "structure"
    max_pixels: int = PIXEL_LIMIT

    def __post_init__(self) -> None:
        if self.depth not in IMAGE_CHECKS:
            raise ValueError(f"--check-images must be one of {', '.join(IMAGE_CHECKS)}, got {self.depth!r}")
        if self.max_pixels < 1:
            raise ValueError(f"--max-image-pixels must be 1 or more, got {self.max_pixels}")


@dataclass(frozen=True)
class ShardPlan:
    """The source rows of a shard."""

    group: str
    dataset: str
    name: str
    units: tuple[SourceUnit, ...]
    checks: ImageChecks

    @property
    def rows(self) -> int:
        """Return the number of source rows of the shard."""
        return sum(unit.rows for unit in self.units)


@dataclass(frozen=True)
class DatasetPlan:
    """The sources (location, rows) and shards of one dataset; ``bad_files`` are (location, reason) of skipped files."""

    group: str
    name: str
    sources: list[tuple[str, int]]
    shards: list[ShardPlan]
    bad_files: list[tuple[str, str]]


@dataclass(frozen=True)
class IndexPlan:
    """The part of the manifest that is known before building; ``format.Manifest`` explains both keys."""

    build_key: str
    tokenizer_fingerprint: str
    tokenizer_path: str
    vocabulary_size: int
    datasets: list[DatasetPlan]
    inputs_key: str

    @property
    def shards(self) -> list[ShardPlan]:
        """Return all shards in the order of the index."""
        return [shard for dataset in self.datasets for shard in dataset.shards]

    @property
    def is_remote(self) -> bool:
        """Return whether a source is not a local file."""
        return any(is_remote(location) for dataset in self.datasets for location, _ in dataset.sources)

    def summary(self) -> dict[str, Any]:
        """Return what merging finished shards needs, for a JSON file: the shards only by name."""
        datasets = [{**vars(dataset), "shards": [shard.name for shard in dataset.shards]} for dataset in self.datasets]
        return {**vars(self), "datasets": datasets}


def plan_index(groups: Sequence[GroupConfig], tokenizer: Tokenizer, rows_per_shard: int, checks: ImageChecks) -> IndexPlan:
    """Plan the index of ``groups``. Raises ValueError if a source is missing or no file of a dataset is usable."""
    datasets = [_plan_dataset(group, entry, rows_per_shard, checks) for group in groups for entry in group.datasets]
    stats = [(location, *size_and_time(location)) for dataset in datasets for location, _ in dataset.sources]
    inputs = [SCHEMA_VERSION, tokenizer.fingerprint, [dataclasses.asdict(dataset) for dataset in datasets]]
    keys = _key([*inputs, stats]), _key(inputs)
    return IndexPlan(keys[0], tokenizer.fingerprint, str(tokenizer.path), len(tokenizer), datasets, keys[1])


def _key(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _plan_dataset(group: GroupConfig, entry: DatasetEntry, rows_per_shard: int, checks: ImageChecks) -> DatasetPlan:
    label = f"dataset {group.name}/{entry.name}"
    location = entry.location
    if group.name in (T2I, EDIT):
        if location.data_dir is None:
            raise ValueError(f"{label}: no data_dir; give it under dataset_info in the YAML, or give --data-root")
        return _plan_parquet(group.name, entry, _parquet_files(location.data_dir, label), rows_per_shard, checks)
    if location.jsonl_path is None or (group.name == VLM and location.data_dir is None):
        raise ValueError(f"{label}: jsonl_path (and for images data_dir) missing; give them under dataset_info, or give --data-root")
    if not is_file(location.jsonl_path):
        raise ValueError(f"{label}: there is no file {location.jsonl_path} (jsonl_path)")
    if group.name == VLM and location.data_dir is not None and not is_folder(location.data_dir):
        raise ValueError(f"{label}: there is no image folder {location.data_dir} (data_dir)")
    jsonl, images = absolute(location.jsonl_path), "" if location.data_dir is None else absolute(location.data_dir)
    units = scan_jsonl(jsonl, group.name, images, group.frame_sampler, rows_per_shard)
    shards = [ShardPlan(group.name, entry.name, f"{i:05d}", (unit,), checks) for i, unit in enumerate(units)]
    return DatasetPlan(group.name, entry.name, [(jsonl, sum(unit.rows for unit in units))], shards, [])


def _parquet_files(folder: str, label: str) -> list[str]:
    try:
        files = list_files(folder, ".parquet")
    except ValueError as error:
        raise ValueError(f"{label}: {error} (data_dir)") from error
    if not files:
        raise ValueError(f"{label}: no *.parquet in {folder} (data_dir)")
    return files


def _plan_parquet(group: str, entry: DatasetEntry, files: list[str], rows_per_shard: int, checks: ImageChecks) -> DatasetPlan:
    """Plan a parquet dataset. Consecutive files share a shard until it has ``rows_per_shard`` rows; a file is never cut."""
    bad_files = [(path, "the file is not listed in parquet_info") for path in _unlisted(files, entry)]
    unlisted = {path for path, _ in bad_files}
    sources: list[tuple[str, int]] = []
    runs: list[list[SourceUnit]] = []
    for path in files:
        rows = 0
        if path not in unlisted:
            try:
                rows = check_parquet(path, group)
            except BadRow as error:
                bad_files.append((path, str(error)))
        if rows:
            if not runs or sum(unit.rows for unit in runs[-1]) >= rows_per_shard:
                runs.append([])
            runs[-1].append(SourceUnit(group, path, len(sources), 0, rows))
        sources.append((path, rows))
    shards = [ShardPlan(group, entry.name, f"{i:05d}", tuple(run), checks) for i, run in enumerate(runs)]
    return DatasetPlan(group, entry.name, sources, shards, bad_files)


def _unlisted(files: list[str], entry: DatasetEntry) -> list[str]:
    """Return files that parquet_info does not list. Its keys match by their last two parts, because datasets move between machines."""
    info = entry.location.parquet_info_path
    if info is None:
        return []
    try:
        reasons = parse_json(read_raw(info), f"dataset {entry.name}: parquet_info_path {info}")
    except OSError as error:
        raise ValueError(f"dataset {entry.name}: parquet_info_path {info} cannot be read ({error})") from error
    if not isinstance(reasons, dict):
        raise ValueError(f"dataset {entry.name}: parquet_info_path {info} holds a {type(reasons).__name__}, expected an object by file")
    known = {last_parts(key) for key in reasons}
    unlisted = [path for path in files if last_parts(path) not in known]
    if len(unlisted) == len(files):
        raise ValueError(
            f"dataset {entry.name}: {info} lists none of the {len(files)} files in {Path(files[0]).parent}; "
            f"its keys should end in {'/'.join(last_parts(files[0]))}"
        )
    return unlisted
