# SPDX-License-Identifier: Apache-2.0
"""Turns finished shards into an index: the manifest is written last, and one rename then makes the folder visible.

A build folder holds the growing index and, separately, what only building needs:

    BUILD/plan.json                          the plan: the shards, their contents and their order
    BUILD/state/<group>/<dataset>/00000.json, .skipped.jsonl      a complete shard, and the rows it skipped
    BUILD/index/<group>/<dataset>/00000.bin ...                   the index as it will be published

Each job of a build has its build folder, ``OUTPUT.job-00002-of-00008``; merging collects their shards.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from megatron_bagel.common.files import write_whole
from megatron_bagel.common.json_files import read_json
from megatron_bagel.data.index.format import (
    MANIFEST,
    SCHEMA_VERSION,
    SKIPPED,
    DatasetInfo,
    Manifest,
    ShardInfo,
    SourceInfo,
    dataset_folder,
    read_manifest,
    shard_from_dict,
)

PLAN, STATE, INDEX = "plan.json", "state", "index"
_LOCK_TIMEOUT = 3.0  # seconds for the workers of a killed build to end, because they hold its lock


def build_folder(output: Path, job: int = 0, jobs: int = 1) -> Path:
    """Return the folder in which one job of a build works until the index is published at ``output``."""
    return output.with_name(f"{output.name}.building" if jobs == 1 else f"{output.name}.job-{job:05d}-of-{jobs:05d}")


def finished_shard(build: Path, group: str, dataset: str, name: str) -> ShardInfo | None:
    """Return the description of a complete shard whose files all exist, else None."""
    path = dataset_folder(build / STATE, group, dataset) / f"{name}.json"
    if not path.is_file():
        return None
    info, stem = shard_from_dict(read_json(path, "finished shard")), dataset_folder(build / INDEX, group, dataset) / name
    files = [(Path(f"{stem}.{suffix}"), size) for suffix, (size, _) in info.files.items()]
    return info if all(file.is_file() and file.stat().st_size == size for file, size in files) else None


def _shard_info(build: Path, group: str, dataset: str, name: str) -> ShardInfo:
    info = finished_shard(build, group, dataset, name)
    if info is None:
        raise ValueError(f"shard {group}/{dataset}/{name} in {build} is not finished; run the build again: finished shards are kept")
    return info


def short_reason(reason: str) -> str:
    """Return the reason without its particulars (numbers, paths, parentheses), as a key to count rows by."""
    words = reason.split(" (")[0].split("; ")[0].split()
    return " ".join(
        "N" if word.isdigit() else "N:" if word.endswith(":") and word[:-1].isdigit() else "PATH" if "/" in word else word for word in words
    )


def skipped_line(group: str, dataset: str, path: str, row: int | None, reason: str) -> str:
    """Return one line of ``skipped.jsonl``; row None stands for the entire file."""
    return json.dumps({"dataset": f"{group}/{dataset}", "file": path, "row": row, "reason": reason}) + "\n"


def publish(build: Path, plan: dict[str, Any], output: Path) -> Manifest:
    """Turn a build folder with complete shards into the index ``output``, which replaces an existing one.

    It can be repeated after a kill at any point. Raises ValueError if a dataset has no usable row.
    """
    if not (build / INDEX / MANIFEST).is_file():
        datasets = [_dataset_info(build, dataset) for dataset in plan["datasets"]]
        _write_skipped(build, plan)
        _refuse_empty(datasets, build / INDEX / SKIPPED)
        settings = (plan["build_key"], plan["tokenizer_fingerprint"], plan["tokenizer_path"], plan["vocabulary_size"])
        # Parts of earlier versions lack the last two.
        manifest = Manifest(SCHEMA_VERSION, *settings, datasets, plan.get("inputs_key"), plan.get("exif", "ignore"))
        write_whole(build / INDEX / MANIFEST, manifest.to_json())
    manifest = read_manifest(build / INDEX)
    for leftover in (build / INDEX).rglob(".*"):  # files that a killed process was writing
        leftover.unlink()
    if output.exists():
        shutil.rmtree(build / "old", ignore_errors=True)
        output.rename(build / "old")
    (build / INDEX).rename(output)
    shutil.rmtree(build)
    return manifest


def merge_jobs(output: Path, parts: Sequence[Path], overwrite: bool = False) -> Manifest:
    """Publish at ``output`` what the jobs of a build wrote into the folders ``parts``, and remove these folders.

    The index has the same bytes as one made by a single job.

    Raises:
        ValueError: If parts are missing, unfinished or of other builds, or if ``output`` already holds another index (unless
            ``overwrite``).
    """
    plan = _common_plan(parts)
    build = build_folder(output)
    with locked(build):
        if output.exists() and not overwrite:
            manifest = read_manifest(output)
            if manifest.build_key != plan["build_key"]:
                raise ValueError(f"{output} holds another index; give --overwrite or another --output")
        else:
            if not (build / INDEX / MANIFEST).is_file() or read_json(build / PLAN, "unfinished build") != plan:
                shutil.rmtree(build, ignore_errors=True)
                _collect(parts, plan, build)
            manifest = publish(build, plan, output)
    for part in parts:
        shutil.rmtree(part)
    return manifest


@contextmanager
def locked(build: Path) -> Iterator[None]:
    """Keep other processes out of a build folder. Raises ValueError if one is in it."""
    build.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(build.with_name(f"{build.name}.lock"), timeout=_LOCK_TIMEOUT, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is building in {build}; wait for it, or end it and run this again") from None
    try:
        yield
    finally:
        # Unlinked while the lock is held: a waiting process notices that the name is gone, and creates the file again.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _common_plan(parts: Sequence[Path]) -> dict[str, Any]:
    if not parts:
        raise ValueError("there is nothing to merge: no folder of a build job exists or was given")
    plans = []
    for part in parts:
        if not (part / PLAN).is_file():
            raise ValueError(f"{part} is not the folder of a build job: it has no {PLAN}")
        plans.append(read_json(part / PLAN, "build job"))
        if plans[-1]["build_key"] != plans[0]["build_key"]:
            raise ValueError(f"{part} was built from other sources, settings or another tokenizer than {parts[0]}; run its job again")
    return plans[0]


def _collect(parts: Sequence[Path], plan: dict[str, Any], build: Path) -> None:
    """Bring every shard into ``build`` from the job that finished it. Raises ValueError if no job has finished one."""
    names = [(dataset["group"], dataset["name"], shard) for dataset in plan["datasets"] for shard in dataset["shards"]]
    finished = {name: (part, info) for name in names for part in parts if (info := finished_shard(part, *name)) is not None}
    unfinished = [name for name in names if name not in finished]
    if unfinished:
        raise ValueError(
            f"{len(unfinished)} of {len(names)} shards are not finished, the first one {'/'.join(unfinished[0])}; run the missing or "
            f"interrupted jobs again. Searched: {', '.join(part.name for part in parts)}"
        )
    for (group, dataset, shard), (part, info) in finished.items():
        for kind, endings in ((INDEX, (*info.files,)), (STATE, ("json", "skipped.jsonl"))):
            target = dataset_folder(build / kind, group, dataset)
            target.mkdir(parents=True, exist_ok=True)
            for ending in endings:
                _link(dataset_folder(part / kind, group, dataset) / f"{shard}.{ending}", target / f"{shard}.{ending}")
    (build / PLAN).write_text(json.dumps(plan))


def _link(source: Path, target: Path) -> None:
    """Give the file a second name, or copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def _dataset_info(build: Path, plan: dict[str, Any]) -> DatasetInfo:
    shards = [_shard_info(build, plan["group"], plan["name"], name) for name in plan["shards"]]
    skipped = Counter(short_reason(reason) for _, reason in plan["bad_files"])
    per_source: Counter[str] = Counter()
    contents: dict[str, tuple[int, int]] = {}
    for shard in shards:
        skipped.update(shard.skipped)
        per_source.update(shard.samples_per_source)
        contents |= shard.source_checksums
    sources = [
        SourceInfo(path, rows, per_source[str(i)], *contents.get(str(i), (None, None))) for i, (path, rows) in enumerate(plan["sources"])
    ]
    return DatasetInfo(plan["group"], plan["name"], sources, shards, dict(skipped))


def _write_skipped(build: Path, plan: dict[str, Any]) -> None:
    with open(build / INDEX / SKIPPED, "w") as file:
        for dataset in plan["datasets"]:
            for path, reason in dataset["bad_files"]:
                file.write(skipped_line(dataset["group"], dataset["name"], path, None, reason))
            for shard in dataset["shards"]:
                file.write((dataset_folder(build / STATE, dataset["group"], dataset["name"]) / f"{shard}.skipped.jsonl").read_text())


def _refuse_empty(datasets: Sequence[DatasetInfo], skipped: Path) -> None:
    for dataset in datasets:
        if not dataset.samples:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in dataset.skipped.items()) or "its files have no rows"
            raise ValueError(f"dataset {dataset.key}: not one usable sample ({reasons}); every row is explained in {skipped}")
