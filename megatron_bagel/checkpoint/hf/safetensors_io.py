# SPDX-License-Identifier: Apache-2.0
"""Safetensors files read and written one tensor at a time, so that converting a model never needs the model in memory.

The library's ``save_file`` needs every tensor at once, and its reader maps the file, so that what was read stays resident. The format is
simple enough for plain reads and writes: 8 bytes header length (little endian), a JSON header of name -> {dtype, shape, data_offsets},
then the raw tensors (https://github.com/huggingface/safetensors). The library still checks every file that is opened.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck, refuse_not_finite
from megatron_bagel.common.direct_file import open_to_write
from megatron_bagel.common.page_cache import forget_part, large_together, read_fully
from megatron_bagel.common.safetensors_header import files_of_index, read_header

_DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_BLOCK_VALUES = 1 << 24
_NAME_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
TensorSpec = tuple[tuple[int, ...], torch.dtype]  # shape, dtype


class _TensorLocation(NamedTuple):
    """A tensor in its file; ``offset`` counts bytes from the start of the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


def _header(file: Path) -> dict[str, _TensorLocation]:
    """Return the locations of a file's tensors by rising offset. Raises ValueError for a file that is incomplete or foreign."""
    tensors = read_header(file)
    try:
        # Opened for torch, it maps the file as memory that could be written to, which Linux refuses for files larger than its memory.
        with safe_open(file, framework="np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}); it may be truncated: copy it again") from error
    _refuse_types(file, {tensor.dtype for tensor in tensors.values()} - _NAME_DTYPES.keys())
    return {name: _TensorLocation(tensor.shape, _NAME_DTYPES[tensor.dtype], tensor.offset) for name, tensor in tensors.items()}


def _refuse_types(file: Path, unknown: set[str]) -> None:
    """Raise ValueError if there are types that are not read."""
    names = ", ".join(sorted(unknown))
    if any(name.startswith("F8_") for name in unknown):
        raise ValueError(
            f"{file} holds fp8 weights ({names}). Their values count only with the scales of the program that wrote them, and rounding to "
            "fp8 cannot be undone: use the folder's bf16, fp16 or fp32 weights"
        )
    if unknown:
        raise ValueError(f"{file} holds tensors of type {names}; read are {', '.join(_NAME_DTYPES)}")


class SafetensorsReader:
    """Tensors of one ``.safetensors`` file, or of all files that an index ``*.safetensors.index.json`` names, read on request.

    Raises ValueError naming a missing, truncated or foreign file.
    """

    def __init__(self, path: str | Path, check_weights: WeightCheck = "sampled", read_once: bool = False) -> None:
        """Read the header.

        Args:
            path: The file, or an index.
            check_weights: How many values of each tensor that is read are checked to be finite.
            read_once: Whether every tensor is read once, so that the system need not keep large files in memory.
        """
        self.path, self.check_weights = Path(path), check_weights
        if not self.path.is_file():
            raise ValueError(f"there is no weight file {self.path}")
        if self.path.suffix == ".json":
            self._file_of = files_of_index(self.path)
        else:
            self._file_of = dict.fromkeys(_header(self.path), self.path)
        self._forgets = read_once and self.is_large
        self._headers: dict[Path, dict[str, _TensorLocation]] = {}

    def _location(self, name: str) -> _TensorLocation:
        file = self._file_of[name]
        if file not in self._headers:
            self._headers[file] = _header(file)
        if name not in self._headers[file]:
            raise ValueError(f"{self.path} says that {name} is in {file.name}, where it is not: copy the folder again")
        return self._headers[file][name]

    def keys(self) -> list[str]:
        """Return all tensor names in file order."""
        return list(self._file_of)

    def origin(self, name: str) -> tuple[SafetensorsReader, str]:
        """Return where the tensor is stored: in this reader, under its own name."""
        return self, name

    @property
    def is_large(self) -> bool:
        """Return whether the files together are too large to be kept in memory (``common/page_cache.py``)."""
        return large_together(set(self._file_of.values()))

    def extents(self) -> dict[Path, dict[str, tuple[int, int]]]:
        """Return the first and the last byte, exclusive, of every tensor by file and name, by rising offset within a file."""
        extents: dict[Path, dict[str, tuple[int, int]]] = {}
        for name, file in self._file_of.items():
            location = self._location(name)
            size = torch.Size(location.shape).numel() * location.dtype.itemsize
            extents.setdefault(file, {})[name] = (location.offset, location.offset + size)
        return {file: dict(sorted(tensors.items(), key=lambda item: item[1])) for file, tensors in extents.items()}

    def forget_files(self) -> None:
        """Drop the files from the system's page cache if they are large together."""
        if self.is_large:
            for file in set(self._file_of.values()):
                forget_part(file, 0)

    def file_names(self) -> dict[str, str]:
        """Return the name of the file that holds each tensor."""
        return {name: file.name for name, file in self._file_of.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def spec(self, name: str) -> TensorSpec:
        """Return shape and dtype without reading the data."""
        location = self._location(name)
        return location.shape, location.dtype

    def first_bytes(self, name: str, count: int) -> bytes:
        """Return the first ``count`` bytes of a tensor, or all that it has."""
        location = self._location(name)
        with self._file_of[name].open("rb") as file:
            file.seek(location.offset)
            return file.read(min(count, torch.Size(location.shape).numel() * location.dtype.itemsize))

    def get(self, name: str) -> torch.Tensor:
        """Read the tensor ``name`` into separate memory. Raises ValueError if the file is too short, or if it holds NaN or infinity."""
        tensor = torch.empty(self._location(name).shape, dtype=self._location(name).dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read the tensor ``name`` into ``out``, which has its type and as many values, apart from each other or not.

        Raises ValueError like ``get``.
        """
        location = self._location(name)
        if out.dtype != location.dtype or out.numel() != torch.Size(location.shape).numel():
            raise ValueError(f"{name} is {location.dtype} {location.shape}, and cannot be read into {out.dtype} {tuple(out.shape)}")
        with self._file_of[name].open("rb", buffering=0) as file:
            file.seek(location.offset)
            for block in contiguous_blocks(out):
                self._fill(_bytes_of(block), file, name)
        refuse_not_finite(out, name, self._file_of[name], self.check_weights)

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Read ``start`` to ``stop`` along ``dim`` (0 or 1) of a tensor, and no other bytes of it. Raises ValueError like ``get``.

        Rows lie together in the file. Columns are read row by row, each by one system call.
        """
        location = self._location(name)
        shape = list(location.shape)
        shape[dim] = stop - start
        tensor = torch.empty(shape, dtype=location.dtype)
        row_bytes = torch.Size(location.shape[1:]).numel() * location.dtype.itemsize
        content = _bytes_of(tensor)
        with self._file_of[name].open("rb", buffering=0) as file:
            if dim == 0:
                file.seek(location.offset + start * row_bytes)
                self._fill(content, file, name)
            else:
                column_bytes = row_bytes // location.shape[1]
                first, size = location.offset + start * column_bytes, (stop - start) * column_bytes
                for row in range(location.shape[0]):
                    file.seek(first + row * row_bytes)
                    self._fill(content[row * size : (row + 1) * size], file, name)
        refuse_not_finite(tensor, name, self._file_of[name], self.check_weights)
        return tensor

    def _fill(self, content: memoryview, file: FileIO, name: str) -> None:
        """Read bytes until ``content`` is full."""
        if not read_fully(file, content, self._forgets):
            raise ValueError(f"{self._file_of[name]} ends inside tensor {name}; copy it again")


def contiguous_blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the parts of ``tensor`` whose values lie together in memory, in order."""
    if tensor.is_contiguous():
        yield tensor
        return
    for part in tensor:
        yield from contiguous_blocks(part)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a tensor. numpy would tie it to an array, but the receiver may free the tensor's memory."""
    if not tensor.nbytes:
        return memoryview(bytearray())  # there is no address
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _in_type(values: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield ``values`` in another type, block by block in the same memory: there is no second whole tensor."""
    if values.dtype == dtype:
        yield values
        return
    memory = torch.empty(min(len(values), _BLOCK_VALUES), dtype=dtype)
    for block in values.split(_BLOCK_VALUES):
        yield memory[: len(block)].copy_(block)


class SafetensorsWriter:
    """Context manager that writes one file whose names, shapes and dtypes are known beforehand, with tensors in any order.

    The file appears under its name only when every tensor has been written (temporary name, fsync, rename).
    """

    def __init__(self, path: str | Path, specs: Mapping[str, TensorSpec], total_bytes: int | None = None) -> None:
        """Plan the file. ``total_bytes`` is the size of all files of which it is one."""
        self.path, self._total_bytes = Path(path), total_bytes
        self._partial = self.path.with_name(self.path.name + ".partial")
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, tuple[int, int]] = {}
        self._specs = dict(specs)
        end = 0
        for name, (shape, dtype) in self._specs.items():
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            self._offsets[name] = (begin, end)
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the data, which readers map
        self._preamble = struct.pack("<Q", len(text)) + text
        self._pending = set(self._specs)

    def __enter__(self) -> SafetensorsWriter:
        size = max((end for _, end in self._offsets.values()), default=0)
        self._file = open_to_write(self._partial, self._total_bytes or size)
        self._file.write(self._preamble)
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write ``tensor`` in the announced dtype; its rows may lie in groups, [groups, rows of a group, ..].

        Raises ValueError for an unknown name, a second write or another shape.
        """
        if name not in self._pending:
            raise ValueError(f"{self.path}: tensor {name} was not announced or was already written")
        shape, dtype = self._specs[name]
        if tuple(shape) not in (tuple(tensor.shape), (tensor.shape[:2].numel(), *tensor.shape[2:])):
            raise ValueError(f"{self.path}: tensor {name} has shape {tuple(tensor.shape)}, announced was {tuple(shape)}")
        self._file.seek(len(self._preamble) + self._offsets[name][0])
        for block in contiguous_blocks(tensor.detach().to(device="cpu")):
            for values in _in_type(block.view(-1), dtype):
                self._file.write(_bytes_of(values))
        self._pending.discard(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        complete = kind is None and not self._pending
        try:
            with self._file:
                if complete:
                    self._file.flush()
                    os.fsync(self._file.fileno())
        except OSError:
            complete = False
            raise
        finally:
            if not complete:
                self._partial.unlink()
        if complete:
            self._partial.replace(self.path)
        elif kind is None:
            raise ValueError(f"{self.path} was not written: {len(self._pending)} tensors never came, e.g. {sorted(self._pending)[:3]}")


class ShardedWriter:
    """Like ``SafetensorsWriter``, but with ``shard_bytes`` over several files ``x-00001-of-00003.safetensors`` with an index.

    Tensors must come in about the order of ``specs``: a file is open from its first tensor to its last.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, TensorSpec], shard_bytes: int | None = None) -> None:
        self.path = Path(path)
        self._shards = [dict(specs)] if shard_bytes is None else _partition_by_size(specs, shard_bytes)
        self._paths = [self.path] if len(self._shards) == 1 else [self._name(number) for number in range(1, len(self._shards) + 1)]
        self._shard_of = {name: number for number, shard in enumerate(self._shards) for name in shard}
        self._pending_counts = [len(shard) for shard in self._shards]
        self._open: dict[int, SafetensorsWriter] = {}
        self._total_bytes = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in specs.values())

    def _name(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.stem}-{number:05d}-of-{len(self._shards):05d}{self.path.suffix}")

    def __enter__(self) -> ShardedWriter:
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write ``tensor``; errors are those of ``SafetensorsWriter.write``."""
        if name not in self._shard_of:
            raise ValueError(f"{self.path}: tensor {name} was not announced")
        number = self._shard_of[name]
        if number not in self._open:
            self._open[number] = SafetensorsWriter(self._paths[number], self._shards[number], self._total_bytes).__enter__()
        self._open[number].write(name, tensor)
        self._pending_counts[number] -= 1
        if not self._pending_counts[number]:
            self._open.pop(number).__exit__(None, None, None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for writer in self._open.values():
            writer.__exit__(kind, error, trace)
        if kind is None and any(self._pending_counts):
            raise ValueError(f"{self.path} was not written: {sum(self._pending_counts)} tensors never came")
        if kind is None and len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self._total_bytes},
                "weight_map": {name: self._paths[n].name for name, n in self._shard_of.items()},
            }
            self.path.with_name(self.path.name + ".index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _partition_by_size(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[dict[str, TensorSpec]]:
    """Partition tensors in order into shards of at most ``max_bytes`` bytes, or of one larger tensor."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, (shape, dtype) in specs.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = (shape, dtype)
        filled += size
    return shards
