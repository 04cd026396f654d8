# SPDX-License-Identifier: Apache-2.0
"""The mask as rectangles of query and key slots, each full or cut along its diagonal, which together hold every visible pair once.

Kernels of MagiAttention's kind take such a list in place of a matrix. The rectangles follow from one fact: where slots run in the order
of the sequence, the queries that see a key are one run of slots. An image is seen from its own first token to the end of the
sample, a noise image by itself, a text token from itself to the end of the sample. The slots of a rank are in the order of the sequence
within [text], [ViT] and [VAE], and each of these segments of queries has rectangles of its own. Any order of slots works; a segment then
ends wherever the next slot is earlier in the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder


class Shape(IntEnum):
    """Which pairs of a rectangle are visible, by MagiAttention's numbers (``attn_type_map``).

    ``CAUSAL`` ends in the lower right corner and ``INVERSE_CAUSAL`` starts in the upper left one. Here both are squares: row i sees the
    columns up to i, or from i on.
    """

    FULL = 0
    CAUSAL = 1
    INVERSE_CAUSAL = 2


@dataclass(frozen=True)
class Rectangles:
    """``queries`` and ``keys`` int32 [n, 2] are slots [start, end); ``shapes`` int32 [n] holds values of ``Shape``."""

    queries: np.ndarray
    keys: np.ndarray
    shapes: np.ndarray


#: Query slots [a, b) and key slots [c, d).
_Sides = tuple[int, int, int, int]


def mask_rectangles(mask: PackMask, queries: TokenOrder, keys: TokenOrder | None = None) -> Rectangles:
    """Return the rectangles between a rank's query slots and the key slots (default: the same slots).

    Every visible pair is in exactly one rectangle, and no other pair is in any. Padding slots are in none. ``keys`` must hold every token
    of ``queries``. In expert-sorted order on one rank there are at most 4 rectangles for each causal split and 6 for each image.
    """
    keys = queries if keys is None else keys
    if not len(queries.positions):
        return Rectangles(*(np.zeros(shape, dtype=np.int32) for shape in ((0, 2), (0, 2), 0)))
    columns = _Columns.of(mask, queries, keys)
    full: list[_Sides] = []
    causal: list[_Sides] = []
    inverse: list[_Sides] = []
    starts = np.flatnonzero(np.diff(queries.positions) < 0) + 1
    for start, end in zip(np.r_[0, starts], np.r_[starts, len(queries.positions)], strict=True):
        first = start + np.searchsorted(queries.positions[start:end], columns.first_position)
        last = start + np.searchsorted(queries.positions[start:end], columns.end_position)
        sloped = columns.sloped_runs(int(start), int(end))
        for c, d in sloped:
            run, run_inverse = _sloped_run(columns, first, last, c, d)
            a = int(columns.own_slot[c])
            causal.append((a, a + d - c, c, d))
            full += run
            inverse += run_inverse
        seen = first < last
        for c, d in sloped:
            seen[c:d] = False
        changes = (np.diff(first) != 0) | (np.diff(last) != 0) | (np.diff(seen) != 0)
        full += [(int(first[c]), int(last[c]), c, d) for c, d in _runs(changes) if seen[c]]
    full = _joined_keys(full)
    sides = np.array([*full, *causal, *inverse], dtype=np.int32).reshape(-1, 4)
    shapes = np.repeat([Shape.FULL, Shape.CAUSAL, Shape.INVERSE_CAUSAL], [len(full), len(causal), len(inverse)])
    return Rectangles(np.ascontiguousarray(sides[:, :2]), np.ascontiguousarray(sides[:, 2:]), shapes.astype(np.int32))


@dataclass(frozen=True)
class _Columns:
    """For each key slot: the positions [first_position, end_position) of its queries, its split, mode, and query slot (-1: elsewhere)."""

    first_position: np.ndarray
    end_position: np.ndarray
    split: np.ndarray
    causal: np.ndarray
    noise: np.ndarray
    own_slot: np.ndarray

    @staticmethod
    def of(mask: PackMask, queries: TokenOrder, keys: TokenOrder) -> _Columns:
        position = keys.positions
        split = mask.token_splits()[position]
        split_end = np.cumsum(mask.split_lens)
        mode = mask.split_modes[split]
        causal, noise = mode == Mode.CAUSAL, mode == Mode.NOISE
        sample_end = np.cumsum(mask.sample_lens)[mask.token_samples()[position]]
        first_position = np.where(causal, position, (split_end - mask.split_lens)[split])
        return _Columns(first_position, np.where(noise, split_end[split], sample_end), split, causal, noise, queries.slots[position])

    def sloped_runs(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the runs of keys whose own query slots are a run of [start, end) too, in one sample, without noise but with text.

        Such a run is a triangle with corrections. Without text it would be no better than one rectangle for each image.
        """
        inside = (self.own_slot >= start) & (self.own_slot < end) & ~self.noise
        changes = (np.diff(inside) != 0) | (np.diff(self.own_slot) != 1) | (np.diff(self.end_position) != 0)
        return [(c, d) for c, d in _runs(changes) if inside[c] and self.causal[c:d].any()]


def _sloped_run(columns: _Columns, first: np.ndarray, last: np.ndarray, c: int, d: int) -> tuple[list[_Sides], list[_Sides]]:
    """Return what a run of keys needs besides its triangle: the queries after it, and the upper half of its images' squares.

    In expert-sorted order these squares are the two markers of each image, in the text segment. As columns of their own, two keys wide,
    they would each take tiles of the kernel down to the end of the sample.
    """
    full, inverse = [], []
    a = int(columns.own_slot[c])
    if last[c] > a + d - c:
        full.append((a + d - c, int(last[c]), c, d))
    for piece_start, piece_end in _runs(np.diff(columns.split[c:d]) != 0):
        g, h = c + piece_start, c + piece_end
        if columns.causal[g]:
            continue
        p = a + piece_start
        if first[g] < p:
            full.append((int(first[g]), p, g, h))
        if h - g > 1:
            inverse.append((p, p + h - g - 1, g + 1, h))
    return full, inverse


def _joined_keys(sides: Sequence[_Sides]) -> list[_Sides]:
    """Join rectangles of the same queries whose keys follow each other."""
    joined: list[_Sides] = []
    for a, b, c, d in sorted(sides):
        if joined and joined[-1][:2] == (a, b) and joined[-1][3] == c:
            joined[-1] = (a, b, joined[-1][2], d)
        else:
            joined.append((a, b, c, d))
    return joined


def _runs(changes: np.ndarray) -> list[tuple[int, int]]:
    """Return the runs [start, end) of a row of at least one slot. ``changes`` tells where slot i + 1 differs from slot i."""
    starts = np.flatnonzero(np.r_[True, changes])
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(changes) + 1], strict=True))
