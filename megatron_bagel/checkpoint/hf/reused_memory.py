# SPDX-License-Identifier: Apache-2.0
"""Memory that is lent to one tensor after another, so that copying terabytes touches few new pages.

The system zeroes each page of new memory when it is first written to. For a tensor that is read, written and forgotten, that costs more
than reading it.
"""

from __future__ import annotations

import threading

import torch

_MIN_BYTES = 1 << 20  # malloc reuses smaller pieces itself
_MAX_WASTE = 4  # a piece is lent for tensors down to this fraction of its size


class ReusedMemory:
    """Lends memory for tensors that live shortly. Threads may share it."""

    def __init__(self) -> None:
        self._lent: dict[int, torch.Tensor] = {}
        self._free: dict[int, torch.Tensor] = {}
        self._lock = threading.Lock()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised CPU tensor, whose storage has exactly its size."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes < _MIN_BYTES:
            return torch.empty(shape, dtype=dtype)
        with self._lock:
            fitting = [memory for memory in self._free.values() if num_bytes <= memory.nbytes <= _MAX_WASTE * num_bytes]
            memory = min(fitting, key=lambda memory: memory.nbytes) if fitting else torch.empty(num_bytes, dtype=torch.uint8)
            self._free.pop(memory.data_ptr(), None)
            self._lent[memory.data_ptr()] = memory
        return torch.frombuffer(memory.numpy().data[:num_bytes], dtype=dtype).view(shape)

    def give_back(self, tensor: torch.Tensor) -> bool:
        """Take back the memory of a tensor, which nobody may read any more. Returns whether it was lent here."""
        with self._lock:
            memory = self._lent.pop(tensor.data_ptr(), None)
            if memory is not None:
                self._free[memory.data_ptr()] = memory
        return memory is not None
