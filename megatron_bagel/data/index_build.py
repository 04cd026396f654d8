"""Builds the index of a dataset config: plans shards from the sources, writes them with any number of processes, publishes once.

Everything is written into ``OUT.building`` and renamed to ``OUT`` at the end, so an index is whole or not there. A build that was
cut off goes on with the shards it had not finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from megatron_bagel.data.groups import EDIT, T2I, VLM, DatasetEntry, GroupConfig
from megatron_bagel.data.index_format import (
    MANIFEST,
    SCHEMA_VERSION,
    SKIPPED,
    DatasetInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    dataset_folder,
    read_manifest,
)
from megatron_bagel.data.index_shard import ShardPlan, finished_shard, short_reason, skipped_line, write_shard
from megatron_bagel.data.raw_readers import BadRow, SourceUnit, check_parquet, scan_jsonl
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer

ROWS_PER_SHARD = 20_000
IMAGE_CHECKS = ("decode", "header")
_PLAN = "plan.json"


@dataclass(frozen=True)
class BuildOptions:
    """``workers`` 0 builds in this process. ``check_images`` "header" is faster and finds only images whose header is bad."""

    workers: int = 0
    rows_per_shard: int = ROWS_PER_SHARD
    check_images: str = "decode"
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.workers < 0 or self.rows_per_shard < 1:
            raise ValueError(f"--workers must be 0 or more and --rows-per-shard 1 or more, got {self.workers} and {self.rows_per_shard}")
        if self.check_images not in IMAGE_CHECKS:
            raise ValueError(f"--check-images must be one of {', '.join(IMAGE_CHECKS)}, got {self.check_images!r}")


@dataclass(frozen=True)
class DatasetPlan:
    """The sources and shards of one dataset; ``bad_files`` are (path, reason) of files kept out whole."""

    group: str
    name: str
    sources: list[tuple[str, int]]
    shards: list[ShardPlan]
    bad_files: list[tuple[str, str]]


def build_index(groups: Sequence[GroupConfig], tokenizer_path: Path, output: Path, options: BuildOptions = BuildOptions()) -> Manifest:
    """Build the index of ``groups`` at ``output`` and return its manifest; one that is there and still fits is returned as it is.

    Raises ValueError when a source is missing, when ``output`` holds something else (unless ``overwrite``), or when not one row
    of a dataset is usable.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    plans = [plan_dataset(group, entry, options) for group in groups for entry in group.datasets]
    build_key = _build_key(plans, tokenizer)
    if output.exists() and not options.overwrite:
        return _existing(output, build_key)
    building = output.with_name(output.name + ".building")
    _prepare(building, build_key)
    shards = _write_shards(building, [shard for plan in plans for shard in plan.shards], tokenizer_path, options)
    datasets = [_dataset_info(plan, [shards[plan.group, plan.name, shard.name] for shard in plan.shards]) for plan in plans]
    _write_skipped(building, plans)
    _refuse_empty(datasets, building / SKIPPED)
    manifest = Manifest(SCHEMA_VERSION, build_key, tokenizer.fingerprint, str(tokenizer_path), len(tokenizer), datasets)
    manifest.write(building / MANIFEST)
    _publish(building, output)
    return manifest


def plan_dataset(group: GroupConfig, entry: DatasetEntry, options: BuildOptions) -> DatasetPlan:
    """Cut a dataset's source rows into shards. Raises ValueError when its files are not where the config says."""
    where = f"dataset {group.name}/{entry.name}"
    place = entry.place
    if group.name in (T2I, EDIT):
        if place.data_dir is None:
            raise ValueError(f"{where}: no data_dir; give it under dataset_info in the YAML, or give --data-root")
        return _plan_parquet(group.name, entry, _parquet_files(place.data_dir, where), options)
    if place.jsonl_path is None or (group.name == VLM and place.data_dir is None):
        raise ValueError(f"{where}: jsonl_path (and for images data_dir) missing; give them under dataset_info, or give --data-root")
    if not place.jsonl_path.is_file():
        raise ValueError(f"{where}: there is no file {place.jsonl_path} (jsonl_path)")
    if group.name == VLM and not place.data_dir.is_dir():
        raise ValueError(f"{where}: there is no image folder {place.data_dir} (data_dir)")
    jsonl, images = place.jsonl_path.absolute(), None if place.data_dir is None else place.data_dir.absolute()
    units = scan_jsonl(jsonl, group.name, images, options.rows_per_shard)
    shards = [ShardPlan(group.name, entry.name, f"{i:05d}", (unit,), options.check_images) for i, unit in enumerate(units)]
    return DatasetPlan(group.name, entry.name, [(str(jsonl), sum(unit.rows for unit in units))], shards, [])


def _parquet_files(folder: Path, where: str) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{where}: there is no folder {folder} (data_dir)")
    files = sorted(folder.absolute().glob("*.parquet"))
    if not files:
        raise ValueError(f"{where}: no *.parquet in {folder} (data_dir)")
    return files


def _plan_parquet(group: str, entry: DatasetEntry, files: list[Path], options: BuildOptions) -> DatasetPlan:
    """Consecutive files share a shard until it has ``rows_per_shard`` rows; a file is never cut."""
    bad_files = [(str(path), "the file is not listed in parquet_info") for path in _unlisted(files, entry)]
    unlisted = {path for path, _ in bad_files}
    sources: list[tuple[str, int]] = []
    runs: list[list[SourceUnit]] = []
    for path in files:
        rows = 0
        if str(path) not in unlisted:
            try:
                rows = check_parquet(path, group)
            except BadRow as error:
                bad_files.append((str(path), str(error)))
        if rows:
            if not runs or sum(unit.rows for unit in runs[-1]) >= options.rows_per_shard:
                runs.append([])
            runs[-1].append(SourceUnit(group, str(path), len(sources), 0, rows))
        sources.append((str(path), rows))
    shards = [ShardPlan(group, entry.name, f"{i:05d}", tuple(run), options.check_images) for i, run in enumerate(runs)]
    return DatasetPlan(group, entry.name, sources, shards, bad_files)


def _unlisted(files: list[Path], entry: DatasetEntry) -> list[Path]:
    """Files that the dataset's parquet_info does not list. Its keys match by their last two parts: data sets move between machines."""
    info_path = entry.place.parquet_info_path
    if info_path is None:
        return []
    try:
        listed = json.loads(info_path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"dataset {entry.name}: parquet_info_path {info_path} cannot be read as JSON ({error})") from error
    known = {Path(key).parts[-2:] for key in listed}
    unlisted = [path for path in files if path.parts[-2:] not in known]
    if len(unlisted) == len(files):
        raise ValueError(
            f"dataset {entry.name}: {info_path} lists none of the {len(files)} files in {files[0].parent}; "
            f"its keys should end in {'/'.join(files[0].parts[-2:])}"
        )
    return unlisted


def _build_key(plans: Sequence[DatasetPlan], tokenizer: Tokenizer) -> str:
    """Names the inputs of a build: the plan, and size and time of every source file."""
    stats = [(path, Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for plan in plans for path, _ in plan.sources]
    content = [SCHEMA_VERSION, tokenizer.fingerprint, [dataclasses.asdict(plan) for plan in plans], stats]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _existing(output: Path, build_key: str) -> Manifest:
    manifest = read_manifest(output)
    if manifest.build_key != build_key:
        raise ValueError(f"{output} holds the index of other sources or another tokenizer; give --overwrite or another --output")
    return manifest


def _prepare(building: Path, build_key: str) -> None:
    """An unfinished build of the same inputs is continued, any other is removed."""
    plan = building / _PLAN
    if building.exists() and not (plan.is_file() and plan.read_text() == build_key):
        shutil.rmtree(building)
    building.mkdir(parents=True, exist_ok=True)
    plan.write_text(build_key)


def _write_shards(
    building: Path, plans: Sequence[ShardPlan], tokenizer_path: Path, options: BuildOptions
) -> dict[tuple[str, str, str], ShardInfo]:
    done: dict[tuple[str, str, str], ShardInfo] = {}
    todo: list[ShardPlan] = []
    for plan in plans:
        info = finished_shard(building, plan)
        if info is None:
            todo.append(plan)
        else:
            done[plan.group, plan.dataset, plan.name] = info
    rows = sum(unit.rows for plan in plans for unit in plan.units)
    left = sum(unit.rows for plan in todo for unit in plan.units)
    with tqdm(total=rows, initial=rows - left, unit="row", desc="index", disable=not options.progress) as bar:
        for plan, info in _run(building, todo, tokenizer_path, options, bar):
            done[plan.group, plan.dataset, plan.name] = info
    return done


def _run(
    building: Path, plans: Sequence[ShardPlan], tokenizer_path: Path, options: BuildOptions, bar: tqdm
) -> Iterator[tuple[ShardPlan, ShardInfo]]:
    if options.workers == 0 or len(plans) < 2:
        for plan in plans:
            yield plan, write_shard(building, plan, _tokenizer(tokenizer_path), bar.update)
        return
    with ProcessPoolExecutor(min(options.workers, len(plans)), mp_context=get_context("fork")) as pool:
        futures = {pool.submit(_write_in_worker, building, plan, tokenizer_path): plan for plan in plans}
        for future in as_completed(futures):
            plan = futures[future]
            bar.update(sum(unit.rows for unit in plan.units))
            yield plan, future.result()


def _write_in_worker(building: Path, plan: ShardPlan, tokenizer_path: Path) -> ShardInfo:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one shard, one core; also silences the warning about forks
    return write_shard(building, plan, _tokenizer(tokenizer_path), lambda _: None)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of this process, loaded once."""
    return load_tokenizer(path)


def _dataset_info(plan: DatasetPlan, shards: list[ShardInfo]) -> DatasetInfo:
    skipped = Counter({short_reason(reason): count for reason, count in Counter(reason for _, reason in plan.bad_files).items()})
    per_source: Counter[str] = Counter()
    for shard in shards:
        skipped.update(shard.skipped)
        per_source.update(shard.samples_per_source)
    sources = [SourceInfo(path, rows, per_source[str(i)]) for i, (path, rows) in enumerate(plan.sources)]
    return DatasetInfo(plan.group, plan.name, sources, shards, dict(skipped))


def _write_skipped(building: Path, plans: Sequence[DatasetPlan]) -> None:
    with open(building / SKIPPED, "w") as file:
        for plan in plans:
            for path, reason in plan.bad_files:
                file.write(skipped_line(plan.group, plan.name, path, None, reason))
            for shard in plan.shards:
                file.write((dataset_folder(building, plan.group, plan.name) / f"{shard.name}.skipped.jsonl").read_text())


def _refuse_empty(datasets: Sequence[DatasetInfo], skipped: Path) -> None:
    for dataset in datasets:
        if not dataset.samples:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in dataset.skipped.items()) or "its files have no rows"
            raise ValueError(f"dataset {dataset.key}: not one usable sample ({reasons}); every row is explained in {skipped}")


def _publish(building: Path, output: Path) -> None:
    """Drop what only a build needs, then put the finished folder in place of whatever was there."""
    (building / _PLAN).unlink()
    for leftover in [*building.glob("*/*/*.skipped.jsonl"), *building.glob("*/*/*.json")]:
        leftover.unlink()
    if output.exists():
        old = output.with_name(output.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        building.rename(output)
        shutil.rmtree(old)
    else:
        building.rename(output)
