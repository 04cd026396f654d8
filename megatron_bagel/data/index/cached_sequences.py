# SPDX-License-Identifier: Apache-2.0
"""The bytes of a shard whose ``.bin`` may be removed at any moment: each read opens it anew and keeps nothing open."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_bagel.data.index.arrow_files import map_checksums, map_numbers
from megatron_bagel.data.index.sequences import HEADER_BYTES, SMALL_BYTES, check_offsets, check_sequence


@dataclass(frozen=True)
class CachedSequences:
    """The sequences of one shard of an index in an object store, with the interface of ``StoredSequences``.

    Attributes:
        stem: Path of the files without their ending.
        lengths: Bytes of every sequence, mapped from the ``.idx``.
        offsets: Position of every sequence in the ``.bin``, mapped as well.
        checksums: CRC-32 of every sequence; None for a shard without recorded ones.
        check_all: Whether every read compares its checksum, not only those of small sequences.
        open_data: Opens the ``.bin``, which is fetched if it is not here.
    """

    stem: str
    lengths: np.ndarray
    offsets: np.ndarray
    checksums: np.ndarray | None
    check_all: bool
    open_data: Callable[[], BinaryIO]

    @classmethod
    def open(
        cls, stem: Path, count: int, data_bytes: int, has_checksums: bool, check_all: bool, open_data: Callable[[], BinaryIO]
    ) -> CachedSequences:
        """Check the table of ``count`` offsets, which fill ``data_bytes``, and return the sequences. Raises ValueError naming the file."""
        table = Path(f"{stem}.idx")
        check_offsets(table, count, data_bytes, multimodal=True)
        checksums = map_checksums(Path(f"{stem}.crc")) if has_checksums else None
        if checksums is not None and len(checksums) != count:
            raise ValueError(f"{stem}.crc holds {len(checksums)} checksums for {count} sequences; remove it from the cache")
        lengths = map_numbers(table, "<i4", count, HEADER_BYTES)
        offsets = map_numbers(table, "<i8", count, HEADER_BYTES + 4 * count)
        return cls(str(stem), lengths, offsets, checksums, check_all, open_data)

    def read(self, number: int, check: bool = False) -> np.ndarray:
        """Return the bytes of one sequence, uint8. ``check`` compares the checksum of a large one, too.

        Raises ValueError if the bytes have changed since they were written.
        """
        length = int(self.lengths[number])
        with self.open_data() as file:
            content = os.pread(file.fileno(), length, int(self.offsets[number]))
        data = np.frombuffer(content, dtype=np.uint8)
        if len(data) != length:
            raise ValueError(f"{self.stem}.bin has only {len(data)} of {length} bytes; remove it from the cache")
        if check or self.check_all or length <= SMALL_BYTES:
            check_sequence(data, self.checksums, number, self.stem)
        return data
