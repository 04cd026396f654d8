"""The shuffled order of a data set with random access: place -> row, one pass visits every row once, nothing is stored.

Up to 2^16 rows the order is the argsort of one random word per row. Above, a Feistel network over the next power of two is
walked until it lands inside the range (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), so a
data set of a billion rows costs no memory and any place of any epoch is reached at once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from megatron_bagel.data.keyed_random import keyed_word, mix64

_STORED_SIZE = 1 << 16
_ROUNDS = 6  # even, so that the two halves end with the widths they began with


def permuted(places: np.ndarray, size: int, seed: int, *what: int | str) -> np.ndarray:
    """Rows (int64) at ``places`` of the order of ``range(size)`` named by ``(seed, *what)``.

    ``places`` is an int64 array with values in [0, size). For a fixed name this is a bijection of ``range(size)``.
    """
    if size <= _STORED_SIZE:
        return _stored(size, seed, what)[places]
    return _feistel(places, size, seed, what)


@lru_cache(maxsize=32)
def _stored(size: int, seed: int, what: tuple[int | str, ...]) -> np.ndarray:
    return np.argsort(keyed_word(seed, *what, np.arange(size)), kind="stable")


def _feistel(places: np.ndarray, size: int, seed: int, what: tuple[int | str, ...]) -> np.ndarray:
    bits = (size - 1).bit_length()
    keys = [np.uint64(keyed_word(seed, *what, "round", i)) for i in range(_ROUNDS)]
    rows = _network(places.astype(np.uint64), bits, keys)
    while (outside := rows >= size).any():
        rows[outside] = _network(rows[outside], bits, keys)
    return rows.astype(np.int64)


def _network(values: np.ndarray, bits: int, keys: list[np.uint64]) -> np.ndarray:
    """A bijection of [0, 2^bits) on uint64 arrays: halves of ``bits // 2`` and the rest, swapping roles every round."""
    right_bits = bits // 2
    left_bits = bits - right_bits
    left, right = values >> np.uint64(right_bits), values & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed = left ^ (mix64(right ^ key) & np.uint64((1 << left_bits) - 1))
        left, right = right, mixed
        left_bits, right_bits = right_bits, left_bits
    return (left << np.uint64(right_bits)) | right
