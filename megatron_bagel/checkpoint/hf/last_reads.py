# SPDX-License-Identifier: Apache-2.0
"""Drops tensors of large files from the system's page cache once they are read for the last time.

A run that starts from pretrained parts reads many tensors twice: both experts of a layer start from the same weights. A tensor that left
the cache after its first reading would come from the disk again. So the reads are counted beforehand, and no page of a tensor leaves
the cache while one is still to come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.common.page_cache import LARGEST_PIECE, forget_part


class LastReads:
    """The reads of ``source`` that are still to come. Files that are small together are left in the cache."""

    def __init__(self, source: TensorSource, names: Iterable[str]) -> None:
        """Count the reads: one of each of ``names``. Names that stand for one tensor of a file are reads of this tensor."""
        self._source = source
        self._file_of: dict[tuple[SafetensorsReader, str], _FileReads] = {}
        reads: dict[SafetensorsReader, Counter[str]] = {}
        for name in names:
            reader, stored_name = source.origin(name)
            reads.setdefault(reader, Counter())[stored_name] += 1
        for reader, counts in reads.items():
            if not reader.is_large:
                continue
            for path, extents in reader.extents().items():
                file = _FileReads(path, extents, counts)
                self._file_of |= {(reader, stored_name): file for stored_name in extents}

    def done(self, names: Iterable[str]) -> None:
        """Note that ``names`` were read, and drop what nobody will read any more."""
        for name in names:
            reader, stored_name = self._source.origin(name)
            file = self._file_of.get((reader, stored_name))
            if file is not None:
                file.done(stored_name)


class _FileReads:
    """The reads of one file. Tensors lie in it by rising offset; what is never read counts as done from the start."""

    def __init__(self, path: Path, extents: dict[str, tuple[int, int]], counts: Counter[str]) -> None:
        self._path, self._extents = path, list(extents.values())
        self._index_of = {name: index for index, name in enumerate(extents)}
        self._left = [counts[name] for name in extents]

    def done(self, name: str) -> None:
        index = self._index_of[name]
        self._left[index] -= 1
        if self._left[index]:
            return
        first = last = index
        while first and self._left[first - 1] <= 0:
            first -= 1
        while last + 1 < len(self._left) and self._left[last + 1] <= 0:
            last += 1
        if first == 0 and last + 1 == len(self._left):
            forget_part(self._path, 0)
            return
        # The cache drops whole pieces only. One that reaches into a neighbour leaves with the later of the two.
        start = max(self._extents[first][0], self._extents[index][0] - LARGEST_PIECE)
        end = min(self._extents[last][1], self._extents[index][1] + LARGEST_PIECE)
        forget_part(self._path, start, end)
