"""Who attends to whom, held as segments: the dense oracle and every backend's own form are derived from here.

Rule (the original's): token q sees k iff both belong to the same sample, and (k is not after q, or both lie in the same
full or noise split), and (k is not in a noise split, or q lies in that same split).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.pack import Pack


@dataclass(frozen=True)
class PackMask:
    """Segments of a pack: lengths of samples and splits, and one mode per split (all int64)."""

    sample_lens: np.ndarray
    split_lens: np.ndarray
    split_modes: np.ndarray

    def __post_init__(self) -> None:
        if self.sample_lens.sum() != self.split_lens.sum():
            raise ValueError(f"splits hold {self.split_lens.sum()} tokens, samples {self.sample_lens.sum()}")

    @staticmethod
    def of(pack: Pack) -> PackMask:
        """The mask of a pack."""
        return PackMask(pack.sample_lens, pack.split_lens, pack.split_modes)

    @property
    def length(self) -> int:
        """Tokens covered."""
        return int(self.sample_lens.sum())

    def token_samples(self) -> np.ndarray:
        """Sample number of every token, [length]."""
        return np.repeat(np.arange(len(self.sample_lens)), self.sample_lens)

    def token_splits(self) -> np.ndarray:
        """Split number of every token, [length]."""
        return np.repeat(np.arange(len(self.split_lens)), self.split_lens)

    def allowed(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Boolean [len(queries), len(keys)]: may the token at position queries[i] see the one at keys[j]?

        Takes any positions in any order; positions at or past ``length`` are padding, which sees and is seen by nothing.
        """
        real = self.length
        sample, split = (np.append(ids, -1) for ids in (self.token_samples(), self.token_splits()))
        modes = np.append(self.split_modes, Mode.CAUSAL)
        q, k = np.minimum(queries, real), np.minimum(keys, real)
        same_split = split[q][:, None] == split[k][None, :]
        key_modes = modes[split[k]][None, :]
        visible = (k[None, :] <= q[:, None]) | (same_split & (key_modes != Mode.CAUSAL))
        visible &= (key_modes != Mode.NOISE) | same_split
        visible &= sample[q][:, None] == sample[k][None, :]
        return visible & (k < real)[None, :] & (q < real)[:, None]

    def dense(self) -> np.ndarray:
        """The oracle: boolean [length, length]."""
        positions = np.arange(self.length)
        return self.allowed(positions, positions)

    def row_areas(self) -> np.ndarray:
        """Number of keys each token sees, [length], in closed form (no [length, length] array)."""
        split_start = np.cumsum(self.split_lens) - self.split_lens
        sample_end = np.cumsum(self.sample_lens)
        sample_of_split = np.searchsorted(sample_end, split_start, side="right")
        seen_later = np.where(self.split_modes == Mode.NOISE, 0, self.split_lens)
        before = np.cumsum(seen_later) - seen_later
        first_split = np.searchsorted(sample_of_split, sample_of_split, side="left")
        prefix = before - before[first_split] if len(before) else before
        inside = np.repeat(self.split_lens, self.split_lens)
        rank = np.arange(self.length) - np.repeat(split_start, self.split_lens) + 1
        causal = np.repeat(self.split_modes == Mode.CAUSAL, self.split_lens)
        return np.repeat(prefix, self.split_lens) + np.where(causal, rank, inside)

    def area(self) -> int:
        """Number of (query, key) pairs: attention work of the pack."""
        return int(self.row_areas().sum())
