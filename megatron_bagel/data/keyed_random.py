# SPDX-License-Identifier: Apache-2.0
"""Every random choice of a run is a pure function of its key: no generator advances or must be saved.

A choice is keyed by (seed, name...), for example ``(seed, "t2i/shapes", 17, 0, "caption")``: dataset, sample index, epoch, purpose.
Any caller gets the same answer, in any order, on any rank or worker. That makes resume exact and losses independent of the parallel
sizes. Two forms are offered:

* ``keyed_uniform`` / ``keyed_integers``: one cheap number per key, and the same numbers for arrays of keys at once (planning
  millions of samples);
* ``keyed_generator`` / ``keyed_normal``: a full Philox stream per key (noise of an image).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import overload

import numpy as np
import torch

Part = int | str | np.ndarray
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of splitmix64
_MUL1, _MUL2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@overload
def mix64(value: int) -> int: ...


@overload
def mix64(value: np.ndarray) -> np.ndarray: ...


def mix64(value: int | np.ndarray) -> int | np.ndarray:
    """Apply the finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words in which every bit depends on all bits.

    An int of any size is taken modulo 2^64.
    """
    if isinstance(value, int):
        value &= _MASK
        value = ((value ^ (value >> 30)) * _MUL1) & _MASK
        value = ((value ^ (value >> 27)) * _MUL2) & _MASK
        return value ^ (value >> 31)
    value = value.astype(np.uint64, copy=False)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(_MUL1)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(_MUL2)
    return value ^ (value >> np.uint64(31))


@lru_cache(maxsize=4096)
def _word_of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _word(part: Part) -> int | np.ndarray:
    if isinstance(part, str):
        return _word_of_text(part)
    if isinstance(part, np.ndarray):
        return mix64(np.atleast_1d(part).astype(np.int64).view(np.uint64) + np.uint64(_GOLDEN))
    return mix64(int(part) + _GOLDEN)


@overload
def keyed_word(seed: int, *what: int | str) -> int: ...


@overload
def keyed_word(seed: int, *what: Part) -> int | np.ndarray: ...


def keyed_word(seed: int, *name: Part) -> int | np.ndarray:
    """Return 64 random bits for the key ``(seed, *name)``, or a uint64 array of them if parts are arrays (broadcast together)."""
    return extended_word(mix64(int(seed) + _GOLDEN), *name)


@overload
def extended_word(word: int, *name: int | str) -> int: ...


@overload
def extended_word(word: int, *name: Part) -> int | np.ndarray: ...


def extended_word(word: int | np.ndarray, *name: Part) -> int | np.ndarray:
    """Return the bits for a key with more parts, ``name``, from the bits for the key without them."""
    for part in name:
        part_word = _word(part)
        # The multiplication makes the order of the parts count: (1, 2) and (2, 1) are different keys.
        if isinstance(word, int) and isinstance(part_word, int):
            word = mix64((word * _MUL2) ^ part_word)
        else:
            shifted = (word * _MUL2) & _MASK if isinstance(word, int) else word * np.uint64(_MUL2)
            word = mix64(np.bitwise_xor(shifted, part_word, dtype=np.uint64))
    return word


@overload
def keyed_uniform(seed: int, *what: int | str) -> float: ...


@overload
def keyed_uniform(seed: int, *what: Part) -> float | np.ndarray: ...


def keyed_uniform(seed: int, *name: Part) -> float | np.ndarray:
    """Return a number in [0, 1) with 53 random bits (float64), or an array of them if a part is an array."""
    word = keyed_word(seed, *name)
    if isinstance(word, np.ndarray):
        return (word >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform_of(word)


def uniform_of(word: int) -> float:
    """Return the number in [0, 1) of 64 random bits."""
    return (word >> 11) * 2.0**-53


@overload
def keyed_integers(high: int, seed: int, *what: int | str) -> int: ...


@overload
def keyed_integers(high: np.ndarray, seed: int, *what: Part) -> np.ndarray: ...


@overload
def keyed_integers(high: int | np.ndarray, seed: int, *what: Part) -> int | np.ndarray: ...


def keyed_integers(high: int | np.ndarray, seed: int, *name: Part) -> int | np.ndarray:
    """Return an integer in [0, high), high < 2^31 (int64 array if ``high`` or a part is an array).

    Raises ValueError if ``high`` is not positive.
    """
    if (high <= 0) if isinstance(high, int) else np.any(np.asarray(high) <= 0):
        raise ValueError(f"cannot choose one of {high} things (key {name}): at least one is needed")
    uniform = keyed_uniform(seed, *name)
    if isinstance(uniform, np.ndarray) or isinstance(high, np.ndarray):
        return np.floor(uniform * high).astype(np.int64)
    return int(uniform * high)


def keyed_generator(seed: int, *name: int | str) -> np.random.Generator:
    """Return a Philox generator whose 128-bit key derives from ``(seed, *name)``."""
    key = keyed_word(seed, *name, "low"), keyed_word(seed, *name, "high")
    return np.random.Generator(np.random.Philox(key=np.array(key, dtype=np.uint64)))


def keyed_normal(shape: tuple[int, ...], seed: int, *name: int | str) -> torch.Tensor:
    """Return a standard normal float32 tensor of ``shape`` on the CPU, keyed by ``(seed, *name)``."""
    return torch.from_numpy(keyed_generator(seed, *name).standard_normal(shape, dtype=np.float32))
