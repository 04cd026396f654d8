# SPDX-License-Identifier: Apache-2.0
"""The columns that planning reads, of one shard or of rows from many shards.

Random order touches every shard of a large index, and calling numpy for each of them repeatedly would take longer than all the
arithmetic.
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
    def row_length(self) -> int | None:
        """Return the number of values per row if it is equal for all rows, else None."""
        counts = np.diff(self.offsets)
        return int(counts[0]) if len(counts) and (counts == counts[0]).all() else None


@dataclass
class PlanningColumns:
    """One entry per sample in each column (``format.PLANNING_SCHEMA``); ``width`` and ``height`` have rows of equal length."""

    text_tokens: Ragged
    structure: Ragged
    width: Ragged
    height: Ragged

    @cached_property
    def largest_number(self) -> int:
        """Return the largest number of the structure column."""
        return int(self.structure.values.max(initial=0))

    @cached_property
    def structure_sums(self) -> np.ndarray:
        """Return the cumulative sums of the structure column, [values + 1]."""
        return np.concatenate([[0], np.cumsum(self.structure.values, dtype=np.int64)])


def concatenate_rows(parts: Iterable[tuple[PlanningColumns, np.ndarray]]) -> PlanningColumns:
    """Copy the given rows of every part, one after the other, into new columns."""
    texts, structures, images = _RowConcatenation(1), _RowConcatenation(1), _RowConcatenation(2)
    for columns, rows in parts:
        texts.add(rows, columns.text_tokens)
        structures.add(rows, columns.structure)
        images.add(rows, columns.width, columns.height)
    return PlanningColumns(*texts.columns(), *structures.columns(), *images.columns())


class _RowConcatenation:
    """Rows of one column, or of several ``columns`` whose rows have equal lengths."""

    def __init__(self, columns: int) -> None:
        self._counts: list[np.ndarray] = []
        self._values: list[list[np.ndarray]] = [[] for _ in range(columns)]

    def add(self, rows: np.ndarray, *columns: Ragged) -> None:
        first_column = columns[0]
        if first_column.row_length in (0, 1):  # as in most data
            self._counts.append(np.full(len(rows), first_column.row_length))
            if not first_column.row_length:
                return
            positions = rows + first_column.offsets[0]
        else:
            starts = first_column.offsets[rows]
            counts = first_column.offsets[rows + 1] - starts
            self._counts.append(counts)
            positions = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))
        for values, column in zip(self._values, columns, strict=True):
            values.append(column.values[positions])

    def columns(self) -> list[Ragged]:
        counts = np.concatenate(self._counts)
        offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        no_values = np.empty(0, dtype=np.int32)
        return [Ragged(offsets, np.concatenate([no_values, *values])) for values in self._values]
