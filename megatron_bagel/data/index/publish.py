"""From finished shards to an index: the manifest is written last and the folder then appears under its name in one rename.

A build folder holds the growing index and, apart from it, what only building needs:

    BUILD/plan.json                          the plan: what the shards are of, and in which order
    BUILD/state/<group>/<dataset>/00000.json, .skipped.jsonl      a shard that is complete, and the rows it left out
    BUILD/index/<group>/<dataset>/00000.bin ...                   the index as it will be published

The jobs of a build have a build folder each, ``OUTPUT.job-00002-of-00008``; merging puts their shards together.
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
from megatron_bagel.data.index.format import (
    MANIFEST,
    SCHEMA_VERSION,
    SHARD_FILES,
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
_PATIENCE = 3.0  # seconds for the workers of a build that was killed to end too: they hold its lock until then


def build_folder(output: Path, job: int = 0, jobs: int = 1) -> Path:
    """Where one job of a build works until the index is published at ``output``."""
    return output.with_name(f"{output.name}.building" if jobs == 1 else f"{output.name}.job-{job:05d}-of-{jobs:05d}")


def finished_shard(build: Path, group: str, dataset: str, name: str) -> ShardInfo | None:
    """The description of a shard that is complete, with all its files in place; else None."""
    path = dataset_folder(build / STATE, group, dataset) / f"{name}.json"
    if not path.is_file():
        return None
    info, stem = shard_from_dict(json.loads(path.read_text())), dataset_folder(build / INDEX, group, dataset) / name
    files = [(Path(f"{stem}.{ending}"), size) for ending, (size, _) in info.files.items()]
    return info if all(file.is_file() and file.stat().st_size == size for file, size in files) else None


def short_reason(reason: str) -> str:
    """The reason without its particulars (numbers, paths, parentheses), to count rows by."""
    words = reason.split(" (")[0].split("; ")[0].split()
    return " ".join("N" if word.isdigit() else "PATH" if "/" in word else word for word in words)


def skipped_line(group: str, dataset: str, path: str, row: int | None, reason: str) -> str:
    """One line of `skipped.jsonl`; row None stands for the whole file."""
    return json.dumps({"dataset": f"{group}/{dataset}", "file": path, "row": row, "reason": reason}) + "\n"


def publish(build: Path, plan: dict[str, Any], output: Path) -> Manifest:
    """Turn a build folder whose shards are all complete into the index ``output``, replacing what was there.

    Can be repeated after a kill at any point. Raises ValueError when not one row of a dataset is usable.
    """
    if not (build / INDEX / MANIFEST).is_file():
        datasets = [_dataset_info(build, dataset) for dataset in plan["datasets"]]
        _write_skipped(build, plan)
        _refuse_empty(datasets, build / INDEX / SKIPPED)
        settings = (plan["build_key"], plan["tokenizer_fingerprint"], plan["tokenizer_path"], plan["vocabulary_size"])
        write_whole(build / INDEX / MANIFEST, Manifest(SCHEMA_VERSION, *settings, datasets).to_json())
    manifest = read_manifest(build / INDEX)
    if output.exists():
        shutil.rmtree(build / "old", ignore_errors=True)
        output.rename(build / "old")
    (build / INDEX).rename(output)
    shutil.rmtree(build)
    return manifest


def merge_jobs(output: Path, parts: Sequence[Path], overwrite: bool = False) -> Manifest:
    """Publish at ``output`` what the jobs of a build made in the folders ``parts``, which are then removed.

    The index has the same bytes as one made by a single job. Raises ValueError when parts are missing, unfinished or of other
    builds, or when ``output`` is there already and is not that index (unless ``overwrite``).
    """
    plan = _common_plan(parts)
    build = build_folder(output)
    with locked(build):
        if output.exists() and not overwrite:
            manifest = read_manifest(output)
            if manifest.build_key != plan["build_key"]:
                raise ValueError(f"{output} holds another index; give --overwrite or another --output")
        else:
            if not (build / INDEX / MANIFEST).is_file() or json.loads((build / PLAN).read_text()) != plan:
                shutil.rmtree(build, ignore_errors=True)
                _collect(parts, plan, build)
            manifest = publish(build, plan, output)
    for part in parts:
        shutil.rmtree(part)
    return manifest


@contextmanager
def locked(build: Path) -> Iterator[None]:
    """Keep a second process out of a build folder. Raises ValueError when another one is in it."""
    build.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(build.with_name(f"{build.name}.lock"), timeout=_PATIENCE, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is building in {build}; wait for it, or end it and run this again") from None
    try:
        yield
    finally:
        # While it is still ours: whoever waits for it notices that the name is gone, and makes the file anew.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _common_plan(parts: Sequence[Path]) -> dict[str, Any]:
    if not parts:
        raise ValueError("there is nothing to merge: no folder of a build job was found or given")
    plans = []
    for part in parts:
        if not (part / PLAN).is_file():
            raise ValueError(f"{part} is not the folder of a build job: it has no {PLAN}")
        plans.append(json.loads((part / PLAN).read_text()))
        if plans[-1]["build_key"] != plans[0]["build_key"]:
            raise ValueError(f"{part} was built from other sources, settings or another tokenizer than {parts[0]}; run its job again")
    return plans[0]


def _collect(parts: Sequence[Path], plan: dict[str, Any], build: Path) -> None:
    """Bring every shard from the job that finished it into ``build``. Raises ValueError when one is finished nowhere."""
    names = [(dataset["group"], dataset["name"], shard) for dataset in plan["datasets"] for shard in dataset["shards"]]
    finished = {name: part for name in names for part in parts if finished_shard(part, *name)}
    missing = [name for name in names if name not in finished]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} shards are not finished, the first being {'/'.join(missing[0])}; run the jobs that are "
            f"missing or broke off again. Looked at: {', '.join(part.name for part in parts)}"
        )
    for (group, dataset, shard), part in finished.items():
        for kind, endings in ((INDEX, SHARD_FILES), (STATE, ("json", "skipped.jsonl"))):
            target = dataset_folder(build / kind, group, dataset)
            target.mkdir(parents=True, exist_ok=True)
            for ending in endings:
                _link(dataset_folder(part / kind, group, dataset) / f"{shard}.{ending}", target / f"{shard}.{ending}")
    (build / PLAN).write_text(json.dumps(plan))


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system cannot do that."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        shutil.copyfile(source, target)


def _dataset_info(build: Path, plan: dict[str, Any]) -> DatasetInfo:
    shards = [finished_shard(build, plan["group"], plan["name"], name) for name in plan["shards"]]
    skipped = Counter(short_reason(reason) for _, reason in plan["bad_files"])
    per_source: Counter[str] = Counter()
    for shard in shards:
        skipped.update(shard.skipped)
        per_source.update(shard.samples_per_source)
    sources = [SourceInfo(path, rows, per_source[str(i)]) for i, (path, rows) in enumerate(plan["sources"])]
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
