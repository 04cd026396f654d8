# SPDX-License-Identifier: Apache-2.0
"""Which weight files a model folder has, and the shapes of their tensors, read from headers alone."""

from __future__ import annotations

from pathlib import Path

from megatron_bagel.common.json_files import read_json
from megatron_bagel.common.notices import notice
from megatron_bagel.common.safetensors_header import files_of_index, read_header
from megatron_bagel.common.wording import shorten

WEIGHT_KINDS = ("ema", "model")
#: vllm-omni loads exactly the files that this index names.
SERVER_INDEX = "model.safetensors.index.json"
_INDEX = ".safetensors.index.json"
_UNFINISHED = ("*.incomplete", "*.part", "*.aria2", "*.crdownload", "*.tmp")


def weight_file(folder: Path, kind: str, name: str | None = None) -> Path | None:
    """Return the file of the weights ``kind`` ("ema" or "model"), or the index of several files; None if the folder has none.

    Args:
        folder: The model folder.
        kind: "ema" or "model".
        name: The weight file or index that ``--weights_name`` names. It counts as "ema" if its name says so, else as "model".
    """
    if name is not None:
        file = named_file(folder, name)
        return file if kind == kind_of_name(name) else None
    candidates = (folder / f"{kind}{_INDEX}", folder / f"{kind}.safetensors")
    return next((file for file in candidates if file.is_file() and not points_at_averages(file)), None)


def points_at_averages(file: Path) -> bool:
    """Return whether ``file`` is an index for servers: named after the model's weights, but naming files of averages."""
    if file.name != SERVER_INDEX:
        return False
    weight_map = read_json(file, "weights").get("weight_map")
    return isinstance(weight_map, dict) and any(str(part).startswith(("ema.", "ema-")) for part in weight_map.values())


def kind_of_name(name: str) -> str:
    """Return "ema" for the name of averaged weights, such as ``ema_bf16.safetensors``, else "model"."""
    return "ema" if "ema" in Path(name).name.lower() else "model"


def named_file(folder: Path, name: str) -> Path:
    """Return the weight file ``name`` of the folder. Raises ValueError if there is none, or if it is of another format."""
    file = folder / name
    if not file.is_file():
        raise ValueError(f"--weights_name {name}: {_absence(folder, file)}")
    if not file.name.endswith((".safetensors", _INDEX)):
        raise ValueError(f"--weights_name {name}: weights are read from a .safetensors file or its {_INDEX[1:]}")
    return file


def describe_absence(folder: Path, kind: str) -> str:
    """Return why the folder has no weights ``kind``, and what to do, for an error message."""
    return _absence(folder, folder / f"{kind}.safetensors")


def _absence(folder: Path, file: Path) -> str:
    if file.is_symlink():
        return f"{file} is a link to {file.readlink()}, which does not exist: the download did not end; download it again"
    text = f"{folder} has no {file.name}"
    if not file.name.endswith(_INDEX):
        text += f" (nor {file.name}.index.json)"
    weight_names = (path.name for path in folder.glob("*.safetensors*") if path.name.endswith((".safetensors", _INDEX)))
    others = sorted(name for name in weight_names if name not in ("ae.safetensors", file.name))
    unfinished = sorted(path.name for pattern in _UNFINISHED for path in folder.rglob(pattern))
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if others:
        text += f"; other files of weights: {shorten(others)} (choose one with --weights_name)"
    if unfinished:
        text += f"; a download did not end: {shorten(unfinished)}"
    if pickles and not others:
        text += f"; pickles are not read: {shorten(pickles)}"
    return text


def any_weight_file(folder: Path, name: str | None = None) -> Path | None:
    """Return the weight file that ``name`` names, or the first that the folder has."""
    files = (weight_file(folder, kind, name) for kind in WEIGHT_KINDS)
    return next((file for file in files if file is not None), None)


def stored_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in a weight file, or in the files of an index. Raises ValueError for a damaged one."""
    if file.suffix != ".json":
        return {name: tensor.shape for name, tensor in read_header(file).items()}
    files = files_of_index(file)
    headers = {path: read_header(path) for path in sorted(set(files.values()))}
    return {name: headers[path][name].shape for name, path in files.items() if name in headers[path]}


def folder_shapes(folder: Path, name: str | None = None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the folder's tensors, or nothing without weights.

    Damaged weights are a notice here: a run may take its weights from elsewhere, and whoever loads them raises the error.
    """
    file = any_weight_file(folder, name)
    try:
        return stored_shapes(file) if file is not None else {}
    except ValueError as error:
        notice(f"sizes are not compared with the tensors: {error}")
        return {}
