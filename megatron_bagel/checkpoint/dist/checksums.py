# SPDX-License-Identifier: Apache-2.0
"""Checksums of a checkpoint's files, written with them and checked before loading, so that damage is found instead of trained on.

``checksums.json`` in a checkpoint's folder maps a file name to {"bytes": size, "sha256": hex}. Every rank computes the sums of its files
on its node; rank 0 adds the small common files.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_bagel.common.files import digest, write_whole
from megatron_bagel.common.json_files import read_json

CHECKSUM_FILE = "checksums.json"
_PART = ".sums-"


def digests(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of files by file name, computed on a few threads (hashing releases Python's lock)."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return {path.name: {"bytes": size, "sha256": sha256} for path, (size, sha256) in zip(paths, pool.map(digest, paths), strict=True)}


def write_part(folder: Path, rank: int, sums: dict[str, dict[str, Any]] | None = None) -> None:
    """Write the sums of the tensor files of ``rank`` in ``folder``, for ``write_checksums`` to collect. ``sums`` avoids computing them."""
    paths = sorted(folder.glob(f"__{rank}_*.distcp")) if sums is None else []
    write_whole(folder / f"{_PART}{rank}", json.dumps(sums or digests(paths)))


def write_checksums(folder: Path) -> None:
    """Merge the parts of all ranks, add the sums of the other files and write ``checksums.json``. One rank calls it after all writes."""
    sums: dict[str, Any] = {}
    for part in sorted(folder.glob(f"{_PART}*")):
        sums |= read_json(part, "checksums of a rank")
        part.unlink()
    remaining_paths = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (*sums, CHECKSUM_FILE)]
    sums |= digests(remaining_paths)
    (folder / CHECKSUM_FILE).write_text(json.dumps(sums, indent=1, sort_keys=True), encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Return the recorded sums, or None for a checkpoint without any. Raises ValueError if the record is damaged."""
    path = folder / CHECKSUM_FILE
    if not path.is_file():
        return None
    try:
        sums = read_json(path, "checkpoint")
        return {str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in sums.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def file_problems(folder: Path) -> list[str]:
    """List the problems that the names and sizes of a checkpoint's files show. Only the record's contents are read."""
    try:
        sums = read_checksums(folder)
    except ValueError as error:
        return [str(error)]
    problems = []
    for name, entry in (sums or {}).items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes of {entry['bytes']}")
    return problems


def damaged(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """List the problems of a checkpoint's files after reading all contents.

    With several callers each checks its share, balanced by size. The list is empty for an undamaged checkpoint, and for one without
    checksums.

    Args:
        folder: The checkpoint.
        part: The number of this caller.
        parts: The number of callers.
    """
    problems = file_problems(folder)
    if problems:
        return problems if part == 0 else []
    sums = read_checksums(folder) or {}
    load = [0] * parts
    names = []
    for name in sorted(sums, key=lambda name: (-sums[name]["bytes"], name)):
        caller = load.index(min(load))
        load[caller] += sums[name]["bytes"]
        if caller == part:
            names.append(name)
    actual_sums = digests([folder / name for name in names])
    return [f"{name} does not have the checksum it was written with" for name in names if actual_sums[name] != sums[name]]
