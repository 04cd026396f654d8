"""Keys and values a context has already computed: append-only and shared between snapshots without copying.

Guidance needs three views of one conversation (all of it, without its last text, without its images) that share long
prefixes. A cache is therefore a value: appending returns a new one, and the old one stays valid. Storage is shared as
long as only one of the holders grows; the second one to grow past a shared prefix copies it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class _Storage:
    """A buffer of ``capacity`` tokens, [capacity, kv_heads, head_dim], of which the first ``filled`` belong to someone."""

    keys: Tensor
    values: Tensor
    filled: int


class LayerCache:
    """Keys and values of one layer for one context; never changes once made."""

    __slots__ = ("_storage", "length")

    def __init__(self, storage: _Storage | None = None, length: int = 0) -> None:
        self._storage = storage
        self.length = length

    @property
    def keys(self) -> Tensor | None:
        """[length, kv_heads, head_dim] after RoPE; ``None`` while nothing was appended."""
        return None if self._storage is None else self._storage.keys[: self.length]

    @property
    def values(self) -> Tensor | None:
        """[length, kv_heads, head_dim]; ``None`` while nothing was appended."""
        return None if self._storage is None else self._storage.values[: self.length]

    def append(self, keys: Tensor, values: Tensor) -> LayerCache:
        """The cache followed by ``keys`` and ``values`` [n, kv_heads, head_dim]."""
        total = self.length + len(keys)
        storage = self._storage
        if storage is None or storage.filled != self.length or total > len(storage.keys):
            storage = self._grown(total, keys)
        storage.keys[self.length : total] = keys
        storage.values[self.length : total] = values
        storage.filled = total
        return LayerCache(storage, total)

    def extended(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What ``append`` would hold, as fresh tensors; for queries that leave the cache as it is."""
        if self._storage is None:
            return keys, values
        return torch.cat((self._storage.keys[: self.length], keys)), torch.cat((self._storage.values[: self.length], values))

    def _grown(self, total: int, like: Tensor) -> _Storage:
        # Doubling makes the copies of a long decode cost O(tokens) in all.
        shape = (max(2 * self.length, total), *like.shape[1:])
        storage = _Storage(like.new_empty(shape), like.new_empty(shape), self.length)
        if self._storage is not None:
            storage.keys[: self.length] = self._storage.keys[: self.length]
            storage.values[: self.length] = self._storage.values[: self.length]
        return storage
