"""Checkpoint folders that are either complete or not there: written under another name, synced to disk, renamed, then pointed to.

<directory>/0000200/                            a complete checkpoint after 200 optimizer steps
<directory>/.saving-0000400/                    being written, or torn by a kill: never loaded, removed by the next save
<directory>/latest_checkpointed_iteration.txt   "200", for people and tools; loading looks at the folders themselves
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

STATE_FILE = "bagel_state.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"
FORMAT_VERSION = 1
_SAVING = ".saving-"
_REPLACED = ".replaced-"
# Written by Megatron-Core: what the shards are, and which tensor lies where.
_REQUIRED = (STATE_FILE, "metadata.json", ".metadata")


def step_folder(directory: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return Path(directory) / f"{step:07d}"


def begin(directory: str | Path, step: int) -> Path:
    """An empty folder to write into. One rank calls this; leftovers of killed saves go."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for torn in directory.glob(f"{_SAVING}*"):
        logger.info("removing %s, left by a save that did not finish", torn)
        shutil.rmtree(torn)
    for replaced in directory.glob(f"{_REPLACED}*"):
        original = directory / replaced.name.removeprefix(_REPLACED)
        if original.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(original)
    saving = directory / f"{_SAVING}{step:07d}"
    saving.mkdir()
    return saving


def state_text(state: Mapping[str, Any]) -> str:
    """The JSON text of what is not a tensor. Raises ValueError for a value JSON cannot hold; call it before writing anything."""
    try:
        return json.dumps(dict(state), indent=1)
    except TypeError as error:
        raise ValueError(f"the state of a checkpoint must be numbers, strings, lists and dictionaries: {error}") from error


def publish(saving: Path) -> Path:
    """Give a completely written folder its name and point to it. One rank calls this after all ranks have written."""
    for path in saving.rglob("*"):
        _sync(path)
    _sync(saving)
    directory, final = saving.parent, saving.parent / saving.name.removeprefix(_SAVING)
    replaced = directory / f"{_REPLACED}{final.name}"
    if final.exists():
        final.rename(replaced)
    saving.rename(final)
    _sync(directory)
    if replaced.exists():
        shutil.rmtree(replaced)
    pointer = directory / f"{LATEST_FILE}.new"
    pointer.write_text(str(int(final.name)), encoding="utf-8")
    _sync(pointer)
    pointer.replace(directory / LATEST_FILE)
    _sync(directory)
    return final


def is_complete(folder: str | Path) -> bool:
    """Whether `folder` holds a published training checkpoint."""
    return all((Path(folder) / name).is_file() for name in _REQUIRED)


def latest_checkpoint(directory: str | Path) -> Path | None:
    """The complete checkpoint with the most steps, or None. Torn and foreign folders are passed over, the former with a log line."""
    directory = Path(directory)
    if not directory.is_dir():
        return None
    best: tuple[int, Path] | None = None
    for folder in sorted(directory.iterdir()):
        if folder.name.startswith(_SAVING):
            logger.warning("ignoring %s: a save that did not finish", folder)
            continue
        # A kill between the two renames of `publish` leaves the earlier save of that step under its other name.
        number = folder.name.removeprefix(_REPLACED)
        if folder.is_dir() and number.isdigit():
            if is_complete(folder):
                best = max(best, (int(number), folder), key=lambda pair: pair[0]) if best else (int(number), folder)
            else:
                logger.warning("ignoring %s: files of a complete checkpoint are missing (%s)", folder, ", ".join(_absent(folder)))
    return best[1] if best else None


def read_state(folder: str | Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises ValueError for a folder that is none, is torn, or was written by a newer version."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} does not exist; nothing is trained from scratch by accident: correct the path")
    if not is_complete(folder):
        found = latest_checkpoint(folder)
        hint = f"; the newest checkpoint inside it is {found}" if found else ""
        raise ValueError(f"{folder} is not a complete training checkpoint: it lacks {', '.join(_absent(folder))}{hint}")
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    if state["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {state['format_version']}, this version of megatron_bagel reads up to {FORMAT_VERSION}; "
            "update megatron_bagel"
        )
    return state


def _absent(folder: Path) -> list[str]:
    return [name for name in _REQUIRED if not (folder / name).is_file()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
