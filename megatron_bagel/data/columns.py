"""The columns that planning reads, of a shard or of rows gathered from many: random order touches every shard of a large index, and
calling numpy for each of them again and again would take longer than all the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """A column of lists without copies: row i is ``values[offsets[i]:offsets[i + 1]]``."""

    offsets: np.ndarray
    values: np.ndarray

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


@dataclass
class PlanningColumns:
    """One entry per sample in each column (index_format.PLANNING_SCHEMA); ``width`` and ``height`` have rows of equal length."""

    text_tokens: Ragged
    structure: Ragged
    width: Ragged
    height: Ragged

    @cached_property
    def structure_sums(self) -> np.ndarray:
        """[values + 1]: sums of the structure column's first values."""
        return np.concatenate([[0], np.cumsum(self.structure.values, dtype=np.int64)])


def gathered(parts: Iterable[tuple[PlanningColumns, np.ndarray]]) -> PlanningColumns:
    """The given rows of every part, one after the other, as columns of their own."""
    texts, structures, images = _Gathering(1), _Gathering(1), _Gathering(2)
    for columns, rows in parts:
        texts.add(rows, columns.text_tokens)
        structures.add(rows, columns.structure)
        images.add(rows, columns.width, columns.height)
    return PlanningColumns(*texts.columns(), *structures.columns(), *images.columns())


class _Gathering:
    """Rows of one column, or of ``columns`` whose rows have equal lengths."""

    def __init__(self, columns: int) -> None:
        self._counts: list[np.ndarray] = []
        self._values: list[list[np.ndarray]] = [[] for _ in range(columns)]

    def add(self, rows: np.ndarray, *columns: Ragged) -> None:
        starts = columns[0].offsets[rows]
        counts = columns[0].offsets[rows + 1] - starts
        self._counts.append(counts)
        total = int(counts.sum())
        if not total:
            return
        if total == len(rows) and counts.min() == 1:  # one each, as in most data
            places = starts
        else:
            places = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(total)
        for values, column in zip(self._values, columns, strict=True):
            values.append(column.values[places])

    def columns(self) -> list[Ragged]:
        counts = np.concatenate(self._counts)
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        nothing = np.empty(0, dtype=np.int32)
        return [Ragged(offsets, np.concatenate([nothing, *values])) for values in self._values]
