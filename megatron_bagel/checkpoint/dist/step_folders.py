# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders that are either complete or absent: written under another name, synced to disk, renamed, then pointed to.

<directory>/0000200/                            a complete checkpoint after 200 optimizer steps
<directory>/.saving-0000400-9b1e44d07c52-5f0c2a91/   unfinished save of a run: never loaded; a later save of that run removes it
<directory>/latest_checkpointed_iteration.txt   "200", for people and tools; loading looks at the folders themselves
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from megatron_bagel.checkpoint.dist.checksums import file_problems, write_checksums
from megatron_bagel.common.json_files import read_json

logger = logging.getLogger(__name__)

STATE_FILE = "bagel_state.json"
LATEST_FILE = "latest_checkpointed_iteration.txt"
FORMAT_VERSION = 1
#: Beginnings of the names of an unfinished save, and of the earlier save of a step until a new one has its name.
SAVING = ".saving-"
REPLACED = ".replaced-"
# Megatron-Core writes the last two: what the shards are, and the file and offset of each tensor.
_REQUIRED = (STATE_FILE, "metadata.json", ".metadata")


def step_folder(directory: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint after ``step`` optimizer steps."""
    return Path(directory) / f"{step:07d}"


def step_of(folder: Path) -> int:
    """Return the number of optimizer steps from the name of a checkpoint's folder."""
    # A kill between the two renames of ``publish`` leaves the earlier save of a step under its other name.
    return int(folder.name.removeprefix(REPLACED))


def newest_step(directory: Path) -> int:
    """Return the highest step with a folder in ``directory``, complete or not; 0 without any."""
    names = [path.name.removeprefix(REPLACED) for path in directory.iterdir()] if directory.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)


def begin(directory: str | Path, step: int, run_id: str = "") -> Path:
    """Create an empty folder to write into. One rank calls this while no other save runs; leftovers of killed saves are removed.

    Only leftovers of the run ``run_id``, and of writers that name no run, are removed: another run may still write its own. The
    folder's name is used once: writers of a killed run may outlive it and must never write into a later save.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for unfinished_folder in directory.glob(f"{SAVING}*"):
        if _writer_of(unfinished_folder) not in ("", run_id):
            logger.info("leaving %s, an unfinished save of another run", unfinished_folder)
            continue
        logger.info("removing %s, left by a save that did not finish", unfinished_folder)
        # Such a writer may still add files; the next save removes what stays.
        shutil.rmtree(unfinished_folder, ignore_errors=True)
    for replaced_folder in directory.glob(f"{REPLACED}*"):
        original_folder = directory / replaced_folder.name.removeprefix(REPLACED)
        if original_folder.exists():
            shutil.rmtree(replaced_folder)
        else:
            replaced_folder.rename(original_folder)
    writer = f"{run_id}-" if run_id else ""
    temporary_folder = directory / f"{SAVING}{step:07d}-{writer}{uuid4().hex[:8]}"
    temporary_folder.mkdir()
    return temporary_folder


def _writer_of(unfinished_folder: Path) -> str:
    """Return the run that the name of an unfinished save contains; empty for none."""
    parts = unfinished_folder.name.removeprefix(SAVING).split("-")
    return parts[1] if len(parts) == 3 else ""


def state_text(state: Mapping[str, Any]) -> str:
    """Return the JSON text of everything that is not a tensor. Raises ValueError for other values; call it before any write."""
    try:
        return json.dumps(dict(state), indent=1)
    except TypeError as error:
        raise ValueError(f"the state of a checkpoint must be numbers, strings, lists and dictionaries: {error}") from error


def publish(temporary_folder: Path) -> Path:
    """Write the checksums of a complete folder, rename it and point to it. One rank calls this after all ranks have written."""
    write_checksums(temporary_folder)
    for path in temporary_folder.rglob("*"):
        _sync(path)
    _sync(temporary_folder)
    directory, final_folder = temporary_folder.parent, temporary_folder.parent / temporary_folder.name.removeprefix(SAVING).split("-")[0]
    replaced_folder = directory / f"{REPLACED}{final_folder.name}"
    if final_folder.exists():
        final_folder.rename(replaced_folder)
    temporary_folder.rename(final_folder)
    _sync(directory)
    if replaced_folder.exists():
        shutil.rmtree(replaced_folder)
    pointer = directory / f"{LATEST_FILE}.new"
    pointer.write_text(str(int(final_folder.name)), encoding="utf-8")
    _sync(pointer)
    pointer.replace(directory / LATEST_FILE)
    _sync(directory)
    return final_folder


def is_complete(folder: str | Path) -> bool:
    """Return whether ``folder`` holds a published training checkpoint."""
    return all((Path(folder) / name).is_file() for name in _REQUIRED)


def latest_checkpoint(directory: str | Path, excluded: Collection[Path] = ()) -> Path | None:
    """Return the complete checkpoint with the most steps that is not in ``excluded``, or None.

    Unfinished, truncated and foreign folders are skipped with a log line. Contents are not read (``checksums.damaged`` reads them).
    """
    folders = checkpoints(directory)
    for folder in reversed(folders):
        if folder not in excluded:
            return folder
    return None


def checkpoints(directory: str | Path) -> list[Path]:
    """Return all complete checkpoints of a run by rising step. Folders that look like one but are unusable are logged."""
    complete, unusable = look_through(directory)
    for folder, problems in unusable.items():
        logger.warning("ignoring %s: %s", folder, ", ".join(problems[:5]))
    return complete


def look_through(directory: str | Path) -> tuple[list[Path], dict[Path, list[str]]]:
    """Return the complete checkpoints by rising step, and unusable folders with their problems, by names and sizes of files."""
    directory = Path(directory)
    if not directory.is_dir():
        return [], {}
    complete: dict[int, Path] = {}
    unusable: dict[Path, list[str]] = {}
    for folder in sorted(directory.iterdir()):
        if folder.name.startswith(SAVING):
            unusable[folder] = ["a save that did not finish"]
            continue
        if not (folder.is_dir() and folder.name.removeprefix(REPLACED).isdigit()):
            continue
        problems = [f"{name} is missing" for name in _absent_files(folder)] or file_problems(folder)
        if problems:
            unusable[folder] = problems
        else:
            complete[step_of(folder)] = folder
    return [complete[step] for step in sorted(complete)], unusable


def unusable_only(directory: str | Path) -> dict[Path, list[str]]:
    """Return published checkpoints with damaged files if the directory has no complete checkpoint, else nothing."""
    complete, unusable = look_through(directory)
    return {} if complete else {folder: problems for folder, problems in unusable.items() if not folder.name.startswith(SAVING)}


def retain(
    directory: str | Path,
    keep_last: int,
    keep_every: int,
    protected: Collection[Path] = (),
    is_own: Callable[[Path], bool] = lambda folder: True,
) -> list[Path]:
    """Delete all checkpoints except the newest ``keep_last``, those of steps divisible by ``keep_every``, and ``protected``.

    ``keep_last`` 0 keeps all; ``keep_every`` 0 means no such steps. Checkpoints that are not ``is_own`` are neither counted nor deleted.
    One rank calls this after a save.

    Returns:
        The deleted folders.
    """
    candidates = [folder for folder in checkpoints(directory) if is_own(folder)][:-keep_last] if keep_last else []
    removed = [folder for folder in candidates if folder not in protected and not (keep_every and step_of(folder) % keep_every == 0)]
    for folder in removed:
        logger.info("removing %s: keep_last is %d", folder, keep_last)
        # Without this file the folder is no checkpoint, even if the deletion stops halfway.
        (folder / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def read_state(folder: str | Path) -> dict[str, Any]:
    """Read the JSON state of a checkpoint. Raises ValueError for any folder that is no complete checkpoint this version reads."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} does not exist; the run will not silently train from scratch, so correct the path")
    if not is_complete(folder):
        newest_folder = latest_checkpoint(folder)
        hint = f"; the newest checkpoint inside it is {newest_folder}" if newest_folder else ""
        unusable = unusable_only(folder)
        if unusable:
            reasons = "; ".join(f"{path.name}: {', '.join(problems[:5])}" for path, problems in unusable.items())
            raise ValueError(f"no checkpoint in {folder} can be used ({reasons}); copy one of them again with its hidden files (cp -r)")
        raise ValueError(f"{folder} is not a complete training checkpoint: it lacks {', '.join(_absent_files(folder))}{hint}")
    try:
        state = read_json(folder / STATE_FILE, "checkpoint")
        if not isinstance(state.get("format_version"), int):
            raise ValueError("it has no format_version")
    except ValueError as error:
        raise ValueError(f"{folder / STATE_FILE} is damaged ({error}); copy the checkpoint again, or use another step") from error
    if state["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {state['format_version']}, this version of megatron_bagel reads up to {FORMAT_VERSION}; "
            "update megatron_bagel"
        )
    problems = file_problems(folder)
    if problems:
        raise ValueError(f"{folder} is damaged: {', '.join(problems[:5])}; copy it again, or use another step")
    return state


def is_average(state: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's weights are averages themselves, as after an import of a released folder."""
    return bool(state.get("ema_is_model", False))


def _absent_files(folder: Path) -> list[str]:
    return [name for name in _REQUIRED if not (folder / name).is_file()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
