# SPDX-License-Identifier: Apache-2.0
"""Who attends to whom, stored as segments from which the dense reference and every backend derive their masks.

Rule (the original's): token q sees k iff both belong to the same sample, and (k is not after q, or both are in the same
full or noise split), and (k is not in a noise split, or q is in the same split).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.pack import Pack


@dataclass(frozen=True)
class PackMask:
    """Segments of a pack: the lengths of samples and splits, and one mode per split (all int64)."""

    sample_lens: np.ndarray
    split_lens: np.ndarray
    split_modes: np.ndarray

    def __post_init__(self) -> None:
        if self.sample_lens.sum() != self.split_lens.sum():
            raise ValueError(f"splits hold {self.split_lens.sum()} tokens, samples {self.sample_lens.sum()}")

    @staticmethod
    def of(pack: Pack) -> PackMask:
        """Return the mask of a pack."""
        return PackMask(pack.sample_lens, pack.split_lens, pack.split_modes)

    @property
    def length(self) -> int:
        """Return the number of tokens."""
        return int(self.sample_lens.sum())

    def token_samples(self) -> np.ndarray:
        """Return the sample number of every token, [length]."""
        return np.repeat(np.arange(len(self.sample_lens)), self.sample_lens)

    def token_splits(self) -> np.ndarray:
        """Return the split number of every token, [length]."""
        return np.repeat(np.arange(len(self.split_lens)), self.split_lens)

    def allowed(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return boolean [len(queries), len(keys)]: whether the token at position queries[i] sees the one at keys[j].

        Positions may come in any order. Positions at or past ``length`` are padding: they see nothing and nothing sees them.
        """
        length = self.length
        sample, split = (np.append(ids, -1) for ids in (self.token_samples(), self.token_splits()))
        modes = np.append(self.split_modes, Mode.CAUSAL)
        q, k = np.minimum(queries, length), np.minimum(keys, length)
        same_split = split[q][:, None] == split[k][None, :]
        key_modes = modes[split[k]][None, :]
        visible = (k[None, :] <= q[:, None]) | (same_split & (key_modes != Mode.CAUSAL))
        visible &= (key_modes != Mode.NOISE) | same_split
        visible &= sample[q][:, None] == sample[k][None, :]
        return visible & (k < length)[None, :] & (q < length)[:, None]

    def dense(self) -> np.ndarray:
        """Return the full boolean matrix [length, length], the reference of the tests."""
        positions = np.arange(self.length)
        return self.allowed(positions, positions)

    def row_areas(self) -> np.ndarray:
        """Return the number of keys each token sees, [length], in closed form (without a [length, length] array)."""
        split_start = np.cumsum(self.split_lens) - self.split_lens
        sample_end = np.cumsum(self.sample_lens)
        sample_of_split = np.searchsorted(sample_end, split_start, side="right")
        visible_lens = np.where(self.split_modes == Mode.NOISE, 0, self.split_lens)
        lens_before = np.cumsum(visible_lens) - visible_lens
        first_split = np.searchsorted(sample_of_split, sample_of_split, side="left")
        prefix = lens_before - lens_before[first_split] if len(lens_before) else lens_before
        split_len_of_token = np.repeat(self.split_lens, self.split_lens)
        rank_in_split = np.arange(self.length) - np.repeat(split_start, self.split_lens) + 1
        causal = np.repeat(self.split_modes == Mode.CAUSAL, self.split_lens)
        return np.repeat(prefix, self.split_lens) + np.where(causal, rank_in_split, split_len_of_token)

    def area(self) -> int:
        """Return the number of (query, key) pairs, the attention work of the pack."""
        return int(self.row_areas().sum())
