# SPDX-License-Identifier: Apache-2.0
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

from megatron_bagel.common.json_text import parse_json
from megatron_bagel.data.index.format import SCHEMA_VERSION
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, TEXT, VLM, DatasetEntry, GroupConfig
from megatron_bagel.data.sources.files import absolute, is_file, is_folder, is_remote, last_parts, list_files, read_raw, size_and_time
from megatron_bagel.data.sources.hub_files import container_of, download_files
from megatron_bagel.data.sources.records import BadRow
from megatron_bagel.data.sources.row_format import Container, RowFormat
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.sources.rows import check_parquet, scan_jsonl
from megatron_bagel.data.sources.tar_files import count_tar_samples
from megatron_bagel.data.sources.unit import SourceUnit
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.data.transforms import EXIF_MODES, PIXEL_LIMIT

ROWS_PER_SHARD = 20_000
IMAGE_CHECKS = ("structure", "decode", "header")


@dataclass(frozen=True)
class ImageChecks:
    """How closely images are checked.

    ``depth`` is "structure" (complete, checksums right), "decode" (every pixel) or "header" (format and size only). An image of more
    than ``max_pixels`` pixels counts as a decompression bomb. ``exif`` "turn" turns pictures as their EXIF orientation says, "ignore"
    leaves them as they are stored.
    """

    depth: str = "structure"
    max_pixels: int = PIXEL_LIMIT
    exif: str = EXIF_MODES[0]

    def __post_init__(self) -> None:
        if self.depth not in IMAGE_CHECKS:
            raise ValueError(f"--check-images must be one of {', '.join(IMAGE_CHECKS)}, got {self.depth!r}")
        if self.max_pixels < 1:
            raise ValueError(f"--max-image-pixels must be 1 or more, got {self.max_pixels}")
        if self.exif not in EXIF_MODES:
            raise ValueError(f"--exif must be one of {', '.join(EXIF_MODES)}, got {self.exif!r}")


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
    exif: str

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


@dataclass(frozen=True)
class PlanRules:
    """What decides a plan besides its sources. ``with_strays`` counts stray files as sources, as earlier versions did."""

    rows_per_shard: int = ROWS_PER_SHARD
    checks: ImageChecks = ImageChecks()
    rows: RowRules = RowRules()
    with_strays: bool = False


def plan_index(groups: Sequence[GroupConfig], tokenizer: Tokenizer, rules: PlanRules) -> IndexPlan:
    """Plan the index of ``groups``. Raises ValueError if a source is missing or no file of a dataset is usable."""
    datasets = _plan_datasets(groups, rules)
    build_key, inputs_key = _keys(tokenizer, datasets, _contents(datasets))
    return IndexPlan(build_key, tokenizer.fingerprint, str(tokenizer.path), len(tokenizer), datasets, inputs_key, rules.checks.exif)


def earlier_build_keys(groups: Sequence[GroupConfig], tokenizer: Tokenizer, rules: PlanRules) -> set[str]:
    """Return the keys that earlier versions gave these sources, when ``exif`` and the rules of rows were no settings.

    An index with such a key stays valid: its bytes mean what they meant, since its manifest has the old value of ``exif``. Stray files
    counted as sources then, so there is a key with those of today and one without.
    """
    return {_earlier_build_key(groups, tokenizer, dataclasses.replace(rules, with_strays=strays)) for strays in (True, False)}


def _earlier_build_key(groups: Sequence[GroupConfig], tokenizer: Tokenizer, rules: PlanRules) -> str:
    datasets = _plan_datasets(groups, rules)
    contents = _contents(datasets)
    for shard in (shard for content in contents for shard in content["shards"]):
        del shard["checks"]["exif"]
        for unit in shard["units"]:
            del unit["rules"]
    return _keys(tokenizer, datasets, contents)[0]


def _plan_datasets(groups: Sequence[GroupConfig], rules: PlanRules) -> list[DatasetPlan]:
    return [_plan_dataset(group, entry, rules) for group in groups for entry in group.datasets]


def _contents(datasets: Sequence[DatasetPlan]) -> list[dict[str, Any]]:
    """Return the plans as JSON values. What a unit does not use looks as it did before it existed, so that keys stay."""
    contents = [dataclasses.asdict(dataset) for dataset in datasets]
    for unit in (unit for content in contents for shard in content["shards"] for unit in shard["units"]):
        if unit["row_format"] is None:
            del unit["row_format"]
        if not unit["rules"]["store_videos"]:
            del unit["rules"]["store_videos"]
    return contents


def _keys(tokenizer: Tokenizer, datasets: list[DatasetPlan], contents: list[dict[str, Any]]) -> tuple[str, str]:
    """Return the build key and the inputs key."""
    stats = [(location, *size_and_time(location)) for dataset in datasets for location, _ in dataset.sources]
    inputs = [SCHEMA_VERSION, tokenizer.fingerprint, contents]
    return _key([*inputs, stats]), _key(inputs)


def _key(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _plan_dataset(group: GroupConfig, entry: DatasetEntry, rules: PlanRules) -> DatasetPlan:
    label = f"dataset {group.name}/{entry.name}"
    location = entry.location
    hub_files = None if location.hub is None else download_files(location.hub, location.hub_files, label)
    container = _container(group, entry) if hub_files is None else container_of(hub_files)
    row_format = _row_format(group, entry, container)
    if hub_files is not None:
        return _plan_files(group.name, entry, list(hub_files), rules, row_format)
    if container != "jsonl":
        if location.data_dir is None:
            raise ValueError(f"{label}: no data_dir; give it under dataset_info in the YAML, or give --data_root")
        files = _source_files(location.data_dir, f".{container}", label, rules.with_strays)
        return _plan_files(group.name, entry, files, rules, row_format)
    if location.jsonl_path is None or (group.name == VLM and location.data_dir is None):
        raise ValueError(f"{label}: jsonl_path (and for images data_dir) missing; give them under dataset_info, or give --data_root")
    if not is_file(location.jsonl_path):
        raise ValueError(f"{label}: there is no file {location.jsonl_path} (jsonl_path)")
    if group.name != TEXT and location.data_dir is not None and not is_folder(location.data_dir):
        raise ValueError(f"{label}: there is no image folder {location.data_dir} (data_dir)")
    jsonl, images = absolute(location.jsonl_path), "" if location.data_dir is None else absolute(location.data_dir)
    try:
        units = scan_jsonl(jsonl, group.name, images, group.frame_sampler, rules.rows_per_shard, rules.rows, row_format)
    except (ValueError, OSError) as error:
        raise ValueError(f"{label}: {error} (jsonl_path)") from error
    shards = [ShardPlan(group.name, entry.name, f"{i:05d}", (unit,), rules.checks) for i, unit in enumerate(units)]
    return DatasetPlan(group.name, entry.name, [(jsonl, sum(unit.rows for unit in units))], shards, [])


def _container(group: GroupConfig, entry: DatasetEntry) -> Container:
    """Return the kind of a dataset's files: the given jsonl file, or what its folder holds."""
    location = entry.location
    if location.jsonl_path is not None:
        return "jsonl"
    if location.data_dir is not None and is_folder(location.data_dir):
        for container in ("parquet", "tar"):
            if list_files(location.data_dir, f".{container}"):
                return container
    return "jsonl" if group.name in (VLM, TEXT) else "parquet"


def _row_format(group: GroupConfig, entry: DatasetEntry, container: Container) -> RowFormat | None:
    """Return how the rows are written, or None for those of BAGEL's guide."""
    guide_container = {T2I: "parquet", EDIT: "parquet", VLM: "jsonl", TEXT: "jsonl"}.get(group.name)
    if container == guide_container and not entry.columns:
        return None
    has_vit = (group.vit_image_transform if group.has_separate_vit else group.image_transform) is not None
    return RowFormat(container, entry.form, entry.columns, group.image_transform is not None, has_vit)


def _source_files(folder: str, ending: str, label: str, with_strays: bool) -> list[str]:
    try:
        files = list_files(folder, ending, with_strays)
    except ValueError as error:
        raise ValueError(f"{label}: {error} (data_dir)") from error
    if not files:
        raise ValueError(f"{label}: no *{ending} in {folder} (data_dir)")
    return files


def _plan_files(group: str, entry: DatasetEntry, files: list[str], rules: PlanRules, row_format: RowFormat | None) -> DatasetPlan:
    """Plan a dataset of many files. Consecutive files share a shard until it has ``rows_per_shard`` rows; a file is never cut."""
    bad_files = [(path, "the file is not listed in parquet_info") for path in _unlisted(files, entry)]
    unlisted = {path for path, _ in bad_files}
    sources: list[tuple[str, int]] = []
    runs: list[list[SourceUnit]] = []
    for path in files:
        rows = 0
        if path not in unlisted:
            try:
                is_tar = row_format is not None and row_format.container == "tar"
                rows = count_tar_samples(path) if is_tar else check_parquet(path, group, row_format)
            except BadRow as error:
                bad_files.append((path, str(error)))
        if rows:
            if not runs or sum(unit.rows for unit in runs[-1]) >= rules.rows_per_shard:
                runs.append([])
            runs[-1].append(SourceUnit(group, path, len(sources), 0, rows, rules=rules.rows, row_format=row_format))
        sources.append((path, rows))
    shards = [ShardPlan(group, entry.name, f"{i:05d}", tuple(run), rules.checks) for i, run in enumerate(runs)]
    return DatasetPlan(group, entry.name, sources, shards, bad_files)


def _unlisted(files: list[str], entry: DatasetEntry) -> list[str]:
    """Return files that parquet_info does not list. Its keys match by their last two parts, because datasets move between machines."""
    info = entry.location.parquet_info_path
    if info is None:
        return []
    try:
        listed_files = parse_json(read_raw(info), f"dataset {entry.name}: parquet_info_path {info}")
    except OSError as error:
        raise ValueError(f"dataset {entry.name}: parquet_info_path {info} cannot be read ({error})") from error
    if not isinstance(listed_files, dict | list) or not all(isinstance(key, str) for key in listed_files):
        raise ValueError(f"dataset {entry.name}: parquet_info_path {info} is no JSON object whose keys are files")
    known = {last_parts(key) for key in listed_files}
    unlisted = [path for path in files if last_parts(path) not in known]
    if len(unlisted) == len(files):
        raise ValueError(
            f"dataset {entry.name}: {info} lists none of the {len(files)} files in {Path(files[0]).parent}; "
            f"its keys should end in {'/'.join(last_parts(files[0]))}"
        )
    return unlisted
