"""Checksums of a checkpoint's files: written with them, checked before they are loaded, so that damage is found and not trained on.

`checksums.json` in a checkpoint's folder: file name -> {"bytes": size, "sha256": hex}. Every rank sums the files it wrote where it wrote
them; the first rank adds the small common files.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_bagel.common.files import digest, write_whole

CHECKSUM_FILE = "checksums.json"
_PART = ".sums-"


def digests(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Sizes and SHA-256 of several files of one folder by file name, on a few threads (hashing releases Python's lock)."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        return {path.name: {"bytes": size, "sha256": sha256} for path, (size, sha256) in zip(paths, pool.map(digest, paths), strict=True)}


def write_part(folder: Path, rank: int, known: dict[str, dict[str, Any]] | None = None) -> None:
    """Sum the tensor files that `rank` has written into `folder` (unless their sums are `known`), for `write_checksums` to collect."""
    mine = sorted(folder.glob(f"__{rank}_*.distcp")) if known is None else []
    write_whole(folder / f"{_PART}{rank}", json.dumps(known or digests(mine)))


def write_checksums(folder: Path) -> None:
    """Put the parts of all ranks together, sum what is in no part, write `checksums.json`. One caller, after all ranks have written."""
    sums: dict[str, Any] = {}
    for part in sorted(folder.glob(f"{_PART}*")):
        sums |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    rest = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in (*sums, CHECKSUM_FILE)]
    sums |= digests(rest)
    (folder / CHECKSUM_FILE).write_text(json.dumps(sums, indent=1, sort_keys=True), encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The recorded sums, or None for a checkpoint without any. Raises ValueError when the record itself is damaged."""
    path = folder / CHECKSUM_FILE
    if not path.is_file():
        return None
    try:
        sums = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in sums.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def missing_or_cut(folder: Path) -> list[str]:
    """What is wrong with the files of a checkpoint as far as their names and sizes tell; reads no contents but the record's."""
    try:
        sums = read_checksums(folder)
    except ValueError as error:
        return [str(error)]
    wrong = []
    for name, entry in (sums or {}).items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes of {entry['bytes']}")
    return wrong


def damaged(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files, all contents read. With `parts` callers each checks its share, dealt by size.

    Empty when all is well or the checkpoint has no checksums.
    """
    wrong = missing_or_cut(folder)
    if wrong:
        return wrong if part == 0 else []
    sums = read_checksums(folder) or {}
    load = [0] * parts
    mine = []
    for name in sorted(sums, key=lambda name: (-sums[name]["bytes"], name)):
        caller = load.index(min(load))
        load[caller] += sums[name]["bytes"]
        if caller == part:
            mine.append(name)
    found = digests([folder / name for name in mine])
    return [f"{name} does not have the checksum it was written with" for name in mine if found[name] != sums[name]]
