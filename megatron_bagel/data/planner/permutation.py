# SPDX-License-Identifier: Apache-2.0
"""The shuffled order of a dataset with random access: position -> row. One pass visits every row once, and nothing is stored.

For up to 2^16 rows the order is the argsort of one random word per row. Above, a Feistel network over the next power of two is
applied until the result is inside the range (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). A
dataset of a billion rows then needs no memory, and any position of any epoch is available at once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megatron_bagel.data.keyed_random import keyed_word, mix64

_STORED_SIZE = 1 << 16
_ROUNDS = 6  # even, so that the two halves end with their initial widths


def permuted(positions: np.ndarray, size: int, seed: int, *name: int | str) -> np.ndarray:
    """Return the rows (int64) at ``positions`` of the order of ``range(size)`` keyed by ``(seed, *name)``.

    ``positions`` is an int64 array with values in [0, size). For a fixed key this is a bijection of ``range(size)``.
    """
    if size <= _STORED_SIZE:
        return _stored(size, seed, name)[positions]
    return _feistel(positions, size, seed, name)


@lru_cache(maxsize=32)
def _stored(size: int, seed: int, name: tuple[int | str, ...]) -> np.ndarray:
    return np.argsort(keyed_word(seed, *name, np.arange(size)), kind="stable")


def _feistel(positions: np.ndarray, size: int, seed: int, name: tuple[int | str, ...]) -> np.ndarray:
    bits = (size - 1).bit_length()
    keys = [np.uint64(keyed_word(seed, *name, "round", i)) for i in range(_ROUNDS)]
    rows = _network(positions.astype(np.uint64), bits, keys)
    while (is_outside := rows >= size).any():
        rows[is_outside] = _network(rows[is_outside], bits, keys)
    return rows.astype(np.int64)


def _network(values: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """Apply a bijection of [0, 2^bits) to uint64 values: two halves of the bits swap roles every round."""
    right_bits = bits // 2
    left_bits = bits - right_bits
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed = left ^ (mix64(right ^ key) & np.uint64((1 << left_bits) - 1))
        left, right = right, mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
