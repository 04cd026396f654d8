# SPDX-License-Identifier: Apache-2.0
"""Reads foreign checkpoints as data, so that nothing in them can run. torch_dist stores its table of contents as a pickle, which could.

A pickle names the classes and functions that it calls. A table of contents needs few and known ones; any other name is refused before
anything is called. torch's guarded loader (``weights_only``) reads tensors and the other objects of a checkpoint.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

_CONTENTS = ".metadata"
_COMMON = "common.pt"
# From 0.19 on Megatron-Core stores the common part as an object among the tensors, a list of one entry, instead of in a file.
COMMON_OBJECT = "common_state/shard_0_1"
# Modules whose listed classes only hold data, as torch's and Megatron-Core's tables of contents use them.
_ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset({
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
        "StorageMeta", "_MEM_FORMAT_ENCODING",
    }),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo", "_StoragePrefix"}),
    "torch.distributed.checkpoint.planner": frozenset({"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"}),
    "torch": frozenset({
        "Size", "float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool", "strided",
        "contiguous_format", "preserve_format", "device",
    }),
    "torch.serialization": frozenset({"_get_layout"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}),
    "pathlib._local": frozenset({"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}),
}  # fmt: skip


class _DataUnpickler(pickle.Unpickler):
    """Unpickles the classes of ``_ALLOWED`` and refuses all others."""

    def __init__(self, content: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(content))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise ValueError(f"{self._path} would call {module}.{name}, which no checkpoint needs; it is not loaded")
        return super().find_class(module, name)


def read_contents(folder: str | Path) -> Metadata:
    """Read the table of contents of a torch_dist checkpoint. Raises ValueError if it is damaged or would run code."""
    path = Path(folder) / _CONTENTS
    try:
        contents = _DataUnpickler(path.read_bytes(), path).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); copy the checkpoint again, or use another step") from error
    if not isinstance(contents, Metadata):
        raise ValueError(f"{path} holds a {type(contents).__name__} instead of a table of contents")
    return contents


def refuse_code(folder: str | Path) -> None:
    """Check that reading the checkpoint ``folder`` runs no code of its writer.

    The check covers all that Megatron-Core unpickles: the table of contents, the common part, and stored objects that are not tensors.

    Raises:
        ValueError: If reading it would run code.
    """
    stored_objects(folder)
    common_file = Path(folder) / _COMMON
    if common_file.is_file():
        _load_object(common_file, common_file.read_bytes())


def read_common(folder: str | Path) -> Any:
    """Read the common part (what is no tensor: settings of the optimizer), wherever the writer's Megatron-Core put it.

    Raises:
        ValueError: If the checkpoint holds none, or reading it would run code.
    """
    common_file = Path(folder) / _COMMON
    if common_file.is_file():
        return _load_object(common_file, common_file.read_bytes())
    objects = stored_objects(folder)
    if COMMON_OBJECT not in objects:
        raise ValueError(f"{folder} holds neither {_COMMON} nor the object {COMMON_OBJECT}; copy it again, or use another step")
    return objects[COMMON_OBJECT][0]


def stored_objects(folder: str | Path) -> dict[str, Any]:
    """Read every stored object that is not a tensor, by name. Raises ValueError if reading one would run code."""
    folder = Path(folder)
    contents = read_contents(folder)
    objects = {}
    for index, location in (contents.storage_data or {}).items():
        if isinstance(contents.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            path = folder / Path(location.relative_path).name
            with path.open("rb") as file:
                file.seek(location.offset)
                objects[index.fqn] = _load_object(path, file.read(location.length))
    return objects


def _load_object(path: Path, content: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "global" in line.lower()), lines[0])
        raise ValueError(f"{path} holds an object that torch does not load as data ({reason}); it is not loaded") from error
