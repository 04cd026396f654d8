"""Checkpoint folders that are either complete or not there: written under another name, synced to disk, renamed, then pointed to.

<directory>/0000200/                            a complete checkpoint after 200 optimizer steps
<directory>/.saving-0000400-5f0c2a91/           being written, or torn by a kill: never loaded, removed by a later save
<directory>/latest_checkpointed_iteration.txt   "200", for people and tools; loading looks at the folders themselves
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_bagel.checkpoint.dist.checksums import missing_or_cut, write_checksums

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


def step_of(folder: Path) -> int:
    """The number of optimizer steps in the name of a checkpoint's folder."""
    # A kill between the two renames of `publish` leaves the earlier save of a step under its other name.
    return int(folder.name.removeprefix(_REPLACED))


def newest_step(directory: Path) -> int:
    """The highest step with a folder in `directory`, whole or not; 0 without any."""
    names = [path.name.removeprefix(_REPLACED) for path in directory.iterdir()] if directory.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def begin(directory: str | Path, step: int) -> Path:
    """An empty folder to write into. One rank calls this, with no other save under way; leftovers of killed saves go.

    Its name is used once: the writers of a killed run may outlive it, and must never write into a later save.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for torn in directory.glob(f"{_SAVING}*"):
        logger.info("removing %s, left by a save that did not finish", torn)
        # Such a writer may still be adding files; what stays goes with the next save.
        shutil.rmtree(torn, ignore_errors=True)
    for replaced in directory.glob(f"{_REPLACED}*"):
        original = directory / replaced.name.removeprefix(_REPLACED)
        if original.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(original)
    saving = directory / f"{_SAVING}{step:07d}-{uuid4().hex[:8]}"
    saving.mkdir()
    return saving


def state_text(state: Mapping[str, Any]) -> str:
    """The JSON text of what is not a tensor. Raises ValueError for a value JSON cannot hold; call it before writing anything."""
    try:
        return json.dumps(dict(state), indent=1)
    except TypeError as error:
        raise ValueError(f"the state of a checkpoint must be numbers, strings, lists and dictionaries: {error}") from error


def publish(saving: Path) -> Path:
    """Give a completely written folder its checksums and its name, and point to it. One rank calls this after all have written."""
    write_checksums(saving)
    for path in saving.rglob("*"):
        _sync(path)
    _sync(saving)
    directory, final = saving.parent, saving.parent / saving.name.removeprefix(_SAVING).split("-")[0]
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


def latest_checkpoint(directory: str | Path, without: Collection[Path] = ()) -> Path | None:
    """The complete checkpoint with the most steps that is not in `without`, or None.

    Torn, cut and foreign folders are passed over, all but the last with a log line; contents are not read (`checksums.damaged` does).
    """
    found = checkpoints(directory)
    for folder in reversed(found):
        if folder not in without:
            return folder
    return None


def checkpoints(directory: str | Path) -> list[Path]:
    """All complete checkpoints of a run by rising step; what looks like one and is not is logged."""
    found, unusable = look_through(directory)
    for folder, wrong in unusable.items():
        logger.warning("ignoring %s: %s", folder, ", ".join(wrong[:5]))
    return found


def look_through(directory: str | Path) -> tuple[list[Path], dict[Path, list[str]]]:
    """(complete checkpoints by rising step, what looks like one and is not, with what is wrong), by names and sizes of files."""
    directory = Path(directory)
    if not directory.is_dir():
        return [], {}
    found: dict[int, Path] = {}
    unusable: dict[Path, list[str]] = {}
    for folder in sorted(directory.iterdir()):
        if folder.name.startswith(_SAVING):
            unusable[folder] = ["a save that did not finish"]
            continue
        if not (folder.is_dir() and folder.name.removeprefix(_REPLACED).isdigit()):
            continue
        wrong = [f"{name} is missing" for name in _absent(folder)] or missing_or_cut(folder)
        if wrong:
            unusable[folder] = wrong
        else:
            found[step_of(folder)] = folder
    return [found[step] for step in sorted(found)], unusable


def lost(directory: str | Path) -> dict[Path, list[str]]:
    """Published checkpoints of a directory whose files are not whole any more, when no other is left there; else nothing."""
    found, unusable = look_through(directory)
    return {} if found else {folder: wrong for folder, wrong in unusable.items() if not folder.name.startswith(_SAVING)}


def retain(directory: str | Path, keep_last: int, keep_every: int, protected: Collection[Path] = ()) -> list[Path]:
    """Delete all but the newest `keep_last` checkpoints, those of steps divisible by `keep_every`, and `protected`; returns what went.

    `keep_last` 0 keeps all; `keep_every` 0 means no such steps. One rank calls this, after a save.
    """
    old = checkpoints(directory)[:-keep_last] if keep_last else []
    removed = [folder for folder in old if folder not in protected and not (keep_every and step_of(folder) % keep_every == 0)]
    for folder in removed:
        logger.info("removing %s: keep_last is %d", folder, keep_last)
        # Without this file it is no checkpoint any more, however far the deletion comes.
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def read_state(folder: str | Path) -> dict[str, Any]:
    """The JSON state of a checkpoint. Raises ValueError for a folder that is none, is torn, or was written by a newer version."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} does not exist; nothing is trained from scratch by accident: correct the path")
    if not is_complete(folder):
        found = latest_checkpoint(folder)
        hint = f"; the newest checkpoint inside it is {found}" if found else ""
        raise ValueError(f"{folder} is not a complete training checkpoint: it lacks {', '.join(_absent(folder))}{hint}")
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / STATE_FILE} is damaged ({error}); copy the checkpoint again, or use another step") from error
    if state["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {state['format_version']}, this version of megatron_bagel reads up to {FORMAT_VERSION}; "
            "update megatron_bagel"
        )
    wrong = missing_or_cut(folder)
    if wrong:
        raise ValueError(f"{folder} is damaged: {', '.join(wrong[:5])}; copy it again, or use another step")
    return state


def is_average(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's weights are averages themselves, as in one made from a released folder."""
    return bool(state.get("ema_is_model", False))


def _absent(folder: Path) -> list[str]:
    return [name for name in _REQUIRED if not (folder / name).is_file()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
