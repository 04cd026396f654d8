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

    @cached_property
    def each(self) -> int | None:
        """Values per row, where all rows have equally many."""
        counts = np.diff(self.offsets)
        return int(counts[0]) if len(counts) and (counts == counts[0]).all() else None


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
        first = columns[0]
        if first.each in (0, 1):  # as in most data
            self._counts.append(np.full(len(rows), first.each))
            if not first.each:
                return
            places = rows + first.offsets[0]
        else:
            starts = first.offsets[rows]
            counts = first.offsets[rows + 1] - starts
            self._counts.append(counts)
            places = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        for values, column in zip(self._values, columns, strict=True):
            values.append(column.values[places])

    def columns(self) -> list[Ragged]:
        counts = np.concatenate(self._counts)
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        nothing = np.empty(0, dtype=np.int32)
        return [Ragged(offsets, np.concatenate([nothing, *values])) for values in self._values]
