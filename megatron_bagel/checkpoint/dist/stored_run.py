# SPDX-License-Identifier: Apache-2.0
"""Which run a checkpoint belongs to, read from its JSON state alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_bagel.checkpoint.dist.step_folders import LATEST_FILE, REPLACED, SAVING, STATE_FILE
from megatron_bagel.common.json_text import parse_json

#: Key of the run's identity in the state that a run continues with.
RUN_ID = "run_id"


@dataclass(frozen=True)
class StoredRun:
    """The run that wrote a checkpoint.

    Attributes:
        run_id: Its identity; empty for a checkpoint of an earlier version, and for one whose state cannot be read.
        imported: Whether a converter wrote the checkpoint, so that no run has trained it and none can continue it.
    """

    run_id: str
    imported: bool


def stored_run(folder: Path) -> StoredRun:
    """Return the run of the checkpoint in ``folder``, which may be damaged."""
    path = folder / STATE_FILE
    try:
        return _read(path, path.stat().st_mtime_ns)
    except OSError:
        return StoredRun("", imported=False)


@lru_cache(maxsize=1024)
def _read(path: Path, changed: int) -> StoredRun:
    """Read once what retention asks for after every save. ``changed`` tells a checkpoint from an earlier one at its path."""
    try:
        run_state = parse_json(path.read_bytes(), str(path))["run"]
        return StoredRun(str(run_state.get(RUN_ID, "")), imported=bool(run_state) and not run_state.keys() - {"config"})
    except (ValueError, KeyError, AttributeError):
        return StoredRun("", imported=False)


def belongs_to(folder: Path, run_id: str) -> bool:
    """Return whether a checkpoint belongs to the run ``run_id``.

    Checkpoints of earlier versions name no run. They belong to the run that continues them, because a run that does not is refused the
    folder. An empty ``run_id`` stands for a writer without an identity, to which everything belongs.
    """
    stored = stored_run(folder)
    return not run_id or stored.run_id == run_id or (not stored.run_id and not stored.imported)


def foreign(folders: Iterable[Path], run_id: str) -> list[Path]:
    """Return the checkpoints that name another run than ``run_id``; none for an empty ``run_id``."""
    return [folder for folder in folders if run_id and stored_run(folder).run_id not in ("", run_id)]


def trained_steps(directory: Path) -> list[Path]:
    """Return the step folders in ``directory`` that a run has trained, damaged ones included, by rising step."""
    folders = [path for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    steps = {path: path.name.removeprefix(REPLACED) for path in folders if path.name.removeprefix(REPLACED).isdigit()}
    return [path for path in sorted(steps, key=lambda path: int(steps[path])) if not stored_run(path).imported]


def files_of_run(directory: Path) -> list[Path]:
    """Return what a run has written into its folder of checkpoints: step folders, unfinished saves and the pointer."""
    unfinished = sorted(directory.glob(f"{SAVING}*"))
    return [*trained_steps(directory), *unfinished, *[path for path in [directory / LATEST_FILE] if path.is_file()]]
