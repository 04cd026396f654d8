# SPDX-License-Identifier: Apache-2.0
"""Finds the parts of a run or a recording that can be compared: metrics, checkpoints, model folders, weight files, index folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_bagel.common.json_files import read_json

#: Written by record_runs.py; says where the recording's data and index are.
RECORDING = "recording.json"
METRICS, CHECKPOINT, MODEL, WEIGHTS, FILES = "metrics", "training checkpoint", "model folder", "weight file", "folder of files"
_METRICS_FILES = ("metrics.jsonl", "validation.jsonl")
_CHECKPOINT_FILES = ("bagel_state.json", ".metadata", "metadata.json")
_MODEL_FILES = tuple(f"{kind}.safetensors{index}" for kind in ("ema", "model") for index in ("", ".index.json"))
#: Folders whose files are compared as they are: an index, stored latents, pictures drawn during training.
_FILES_MARKS = ("manifest.json", "latents.json")
_FILES_NAMES = ("samples",)


def kind_of(path: Path) -> str | None:
    """Return what ``path`` is, or None for a folder to look through and for a file that is never compared."""
    if path.is_file():
        if path.suffix == ".jsonl":
            return METRICS
        return WEIGHTS if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json") else None
    if _holds(path, _CHECKPOINT_FILES):
        return CHECKPOINT
    if _holds(path, _MODEL_FILES):
        return MODEL
    return FILES if path.name in _FILES_NAMES or _holds(path, _FILES_MARKS) else None


def discover(root: Path) -> dict[str, Path]:
    """Return every part in ``root`` by its path below ``root``. A root that is a part itself has the name "".

    Raises:
        ValueError: ``root`` does not exist or holds nothing that can be compared.
    """
    if not root.exists():
        raise ValueError(f"{root} does not exist")
    if kind_of(root) is not None:
        return {"": root}
    if root.is_file():
        raise ValueError(f"{root} is neither a metrics file (.jsonl) nor a weight file (.safetensors)")
    parts = {str(path.relative_to(root)): path for path in _walk(root, skip=root / "world" if (root / RECORDING).is_file() else None)}
    if (root / RECORDING).is_file():
        world = _world_of(root)
        parts |= {f"world/{path.relative_to(world)}": path for path in _walk(world)}
    if not parts:
        raise ValueError(f"{root} holds nothing to compare: no metrics.jsonl, training checkpoint, model folder or index")
    return parts


def _walk(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        # A name with a dot first is a save that did not finish, or a program's own.
        if path.name.startswith(".") or path == skip:
            continue
        if path.is_dir():
            if kind_of(path) is not None:
                yield path
            else:
                yield from _walk(path)
        elif path.name in _METRICS_FILES and path.stat().st_size:
            yield path


def _world_of(recording: Path) -> Path:
    """Return the folder of a recording's data and index, which may be that of the recording it continued."""
    record = read_json(recording / RECORDING, "recording")
    if "world" not in record:
        raise ValueError(f"{recording / RECORDING} does not say where the data is; it is not written by record_runs.py")
    world = recording / record["world"]
    if not world.is_dir():
        raise ValueError(f"{recording / RECORDING} names the data {world}, which does not exist; keep the recordings side by side")
    return world


def _holds(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)
