# SPDX-License-Identifier: Apache-2.0
"""The keys and values that a context has computed: append-only, and shared between snapshots without copying.

Guidance needs three views of one conversation (complete, without its last text, without its images) that share long prefixes. A
cache is therefore a value: appending returns a new one, and the old one stays valid. Caches share storage while only one of them grows;
the second one to grow past a shared prefix copies it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Storage:
    """A buffer of ``capacity`` tokens, [capacity, kv_heads, head_dim]; a cache uses the first ``filled``."""

    keys: Tensor
    values: Tensor
    filled: int


class LayerCache:
    """Keys and values of one layer for one context; it never changes."""

    __slots__ = ("_storage", "length")

    def __init__(self, storage: _Storage | None = None, length: int = 0) -> None:
        self._storage = storage
        self.length = length

    @property
    def keys(self) -> Tensor:
        """Return the keys after RoPE, [length, kv_heads, head_dim]. Raises ValueError if nothing was appended."""
        return self._filled_storage.keys[: self.length]

    @property
    def values(self) -> Tensor:
        """Return the values, [length, kv_heads, head_dim]. Raises ValueError if nothing was appended."""
        return self._filled_storage.values[: self.length]

    @property
    def _filled_storage(self) -> _Storage:
        if self._storage is None:
            raise ValueError("the cache is empty: nothing was appended to it")
        return self._storage

    def append(self, keys: Tensor, values: Tensor) -> LayerCache:
        """Return a cache that also holds ``keys`` and ``values`` [n, kv_heads, head_dim]."""
        total = self.length + len(keys)
        storage = self._storage
        if storage is None or storage.filled != self.length or total > len(storage.keys):
            storage = self._grown(total, keys)
        storage.keys[self.length : total] = keys
        storage.values[self.length : total] = values
        storage.filled = total
        return LayerCache(storage, total)

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the content of ``append`` as fresh tensors, for queries that do not change the cache."""
        if self._storage is None:
            return keys, values
        return torch.cat((self._storage.keys[: self.length], keys)), torch.cat((self._storage.values[: self.length], values))

    def _grown(self, total: int, example: Tensor) -> _Storage:
        # Doubling limits the total cost of copies during a long decode to O(tokens).
        shape = (max(2 * self.length, total), *example.shape[1:])
        storage = _Storage(example.new_empty(shape), example.new_empty(shape), self.length)
        if self._storage is not None:
            storage.keys[: self.length] = self._storage.keys[: self.length]
            storage.values[: self.length] = self._storage.values[: self.length]
        return storage
