# SPDX-License-Identifier: Apache-2.0
"""Reads a tensor that ``torch.save`` wrote into memory that exists; ``torch.load`` would allocate new memory for each."""

from __future__ import annotations

import io
import mmap
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from megatron_bagel.common.page_cache import read_fully

_LOCAL_HEADER = struct.Struct("<26xHH")  # ends with the lengths of a name and of what fills up to the data
_STORAGES = {
    "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
}  # fmt: skip

#: What a damaged record makes zipfile and pickle raise.
_DAMAGES = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, MemoryError, NotImplementedError, EOFError, struct.error,
    zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def read_stored(path: Path, offset: int, length: int, out: torch.Tensor, forgets: bool = False) -> bool:
    """Read the tensor in bytes ``offset`` to ``offset + length`` of a file into the contiguous ``out``.

    With ``forgets`` the system need not keep these bytes in memory.

    Returns:
        Whether it was read: these bytes hold a contiguous tensor with the shape and type of ``out``, and nothing else.
    """
    try:
        place = _data_place(path, offset, length, out)
    except _DAMAGES:
        return False  # the caller reads it with torch, which says what is wrong
    if place is None:
        return False
    target = out.view(-1).view(torch.uint8).numpy().data
    with path.open("rb", buffering=0) as file:
        file.seek(place)
        return read_fully(file, target, forgets)


def _data_place(path: Path, offset: int, length: int, out: torch.Tensor) -> int | None:
    """Return the offset of the tensor's values in the file, or None if they are not those of a tensor like ``out``."""
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file, mmap.mmap(file.fileno(), offset + length - start, offset=start, access=mmap.ACCESS_READ) as content:
        entries = {entry.filename.partition("/")[2]: entry for entry in zipfile.ZipFile(cast("IO[bytes]", content)).infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            return None
        places = {name: _place(content, entry) for name, entry in entries.items()}

        def of(name: str) -> bytes:
            return content[places[name] : places[name] + entries[name].file_size]

        if "byteorder" in entries and of("byteorder").decode() != sys.byteorder:
            return None
        storage, numel = _TensorPlan(of("data.pkl")).storage_of_one_like(out)
        values = f"data/{storage}"
        return start + places[values] if numel == out.numel() and entries[values].file_size == out.nbytes else None


def _place(content: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    lengths = _LOCAL_HEADER.unpack_from(content, entry.header_offset)
    return entry.header_offset + _LOCAL_HEADER.size + sum(lengths)


class _TensorPlan(pickle.Unpickler):
    """Reads what the pickle of one tensor says of it. Calls nothing that the pickle names."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def storage_of_one_like(self, out: torch.Tensor) -> tuple[str, int]:
        """Return name and length of the storage. Raises ValueError unless the tensor fills it like ``out``, from its start."""
        (kind, dtype, name, _, numel), first, size, stride, *_ = self.load()
        if kind != "storage" or dtype != out.dtype or first or tuple(size) != tuple(out.shape) or tuple(stride) != out.stride():
            raise ValueError("the tensor is another one, or lies otherwise in memory")
        return name, numel
