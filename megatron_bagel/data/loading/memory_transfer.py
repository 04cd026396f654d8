# SPDX-License-Identifier: Apache-2.0
"""Hands tensors from a reading process to the training process in anonymous memory files, which need no room in /dev/shm.

torch would send them through files in /dev/shm. A container has 64 MB there by default, and when these are full, torch loses the pack in a
thread of the reading process while the training process waits for it. The files here are limited by the machine's memory only, and
they are filled by the thread that reads, so that a failure becomes an error of the reading process.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

_ALIGNMENT = 64  # bytes, a cache line
_SHARED_MEMORY = Path("/dev/shm")
_Record = TypeVar("_Record")  # a dataclass instance


@dataclass(frozen=True)
class _Slice:
    """Where a tensor of the record stands in the memory file; ``name`` is its field."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Parcel(Generic[_Record]):
    """A dataclass instance on its way between processes: its tensor fields are in a memory file, the others are pickled.

    Attributes:
        record: The instance, with empty tensors.
        slices: Where its tensors are.
        size: Bytes in the memory file.
        descriptor: The memory file, as a handle that travels between processes; None for a record without tensor elements.
    """

    record: _Record
    slices: tuple[_Slice, ...]
    size: int
    descriptor: Any

    @classmethod
    def of(cls, record: _Record) -> Parcel[_Record]:
        """Copy the tensors of ``record`` into a memory file. Raises OSError if it cannot be made or filled."""
        tensors = {field.name: value for field in fields(record) if isinstance(value := getattr(record, field.name), torch.Tensor)}  # type: ignore[arg-type]
        slices, size = [], 0
        for name, tensor in tensors.items():
            offset = -(-size // _ALIGNMENT) * _ALIGNMENT
            slices.append(_Slice(name, tensor.dtype, tuple(tensor.shape), offset))
            size = offset + tensor.nbytes
        emptied = replace(record, **{name: torch.empty(0, dtype=tensor.dtype) for name, tensor in tensors.items()})  # type: ignore[type-var]
        if not any(tensor.numel() for tensor in tensors.values()):
            return cls(emptied, tuple(slices), 0, None)
        with _memory_file() as descriptor:
            os.ftruncate(descriptor, size)  # an empty tensor at the end writes nothing
            for piece in slices:
                _write(descriptor, tensors[piece.name], piece.offset)
            return cls(emptied, tuple(slices), size, DupFd(descriptor))

    def open(self) -> _Record:
        """Return the record with its tensors, mapped from the memory file without a copy. A parcel opens once.

        Raises:
            OSError: If the process that made the parcel has ended.
        """
        memory = self._mapped()
        tensors = {piece.name: _view(memory, piece) for piece in self.slices}
        return replace(self.record, **tensors)  # type: ignore[type-var]

    def _mapped(self) -> mmap.mmap | None:
        if self.descriptor is None:
            return None
        descriptor = self.descriptor.detach()
        try:
            return mmap.mmap(descriptor, self.size)
        finally:
            os.close(descriptor)


@contextmanager
def _memory_file() -> Iterator[int]:
    """Give the descriptor of a file without a name; the file lives as long as a descriptor or a mapping of it."""
    descriptor = _open_memory_file()
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_memory_file() -> int:
    try:
        return os.memfd_create("megatron_bagel", os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # not Linux, or a sandbox forbids the call
        with tempfile.TemporaryFile(dir=_SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None) as file:
            return os.dup(file.fileno())


def _write(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    """Write the bytes of a tensor. Unlike a store into mapped memory, a write without room raises an error instead of a signal."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")
    while content:
        written = os.pwrite(descriptor, content, offset)  # at most 2 GiB at once
        content, offset = content[written:], offset + written


def _view(memory: mmap.mmap | None, piece: _Slice) -> torch.Tensor:
    count = torch.Size(piece.shape).numel()
    if memory is None or not count:
        return torch.zeros(piece.shape, dtype=piece.dtype)
    return torch.frombuffer(memory, dtype=piece.dtype, count=count, offset=piece.offset).view(piece.shape)
