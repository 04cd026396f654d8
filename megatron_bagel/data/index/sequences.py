# SPDX-License-Identifier: Apache-2.0
"""The bytes of a shard, read by offset: checked when the shard is first opened, and sequence by sequence as they are read.

    <stem>.bin .idx    Megatron-Core's IndexedDataset of uint8
    <stem>.crc         CRC-32 of every sequence, little-endian uint32; shards of earlier versions have none

The table of offsets (``.idx``) repeats itself: each offset is the one before plus a length. So damage shows without a checksum.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_bagel.common.files import write_whole
from megatron_bagel.data.index.arrow_files import map_checksums

OPENING = threading.Lock()  # a thread holds it from ``StoredSequences.read`` until it has copied the bytes
#: Sequences up to this size have their checksum compared on every read: it takes a hundredth of the time of decoding them.
SMALL_BYTES = 16 << 10
# Megatron-Core's name of the format, version 1, code of uint8; then the numbers of sequences and of documents.
_BEGINNING, HEADER_BYTES = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([1]), 34


@lru_cache(maxsize=64)
def open_indexed(stem: str, changed: int, multimodal: bool) -> IndexedDataset:
    """Open the sequences of a shard, and keep the shards used last.

    An open shard holds three file descriptors, and a large index has more shards than a process may have open files. Views of their
    bytes must not outlive the next call. ``changed``, the time of the ``.bin``, distinguishes a shard from an earlier one at the path.
    """
    return IndexedDataset(stem, multimodal=multimodal, mmap=True)


@dataclass(frozen=True)
class StoredSequences:
    """The sequences of one shard. It holds no open file.

    Attributes:
        stem: Path of the files without their ending.
        changed: Modification time of the ``.bin``.
        multimodal: Whether the ``.idx`` has a mode per sequence.
        checksums: CRC-32 of every sequence; None for a shard without recorded ones.
        check_all: Whether every read compares its checksum, not only those of small sequences.
    """

    stem: str
    changed: int
    multimodal: bool
    checksums: np.ndarray | None
    check_all: bool

    @classmethod
    def open(cls, stem: Path, count: int, multimodal: bool, has_checksums: bool, check_all: bool) -> StoredSequences:
        """Check the table of offsets and return the sequences.

        Args:
            stem: Path of the files without their ending.
            count: How many sequences there must be.
            multimodal: Whether the ``.idx`` has a mode per sequence.
            has_checksums: Whether there is a ``.crc``.
            check_all: See the class.

        Raises:
            ValueError: A table is damaged; the message names the file.
        """
        data = Path(f"{stem}.bin").stat()
        check_offsets(Path(f"{stem}.idx"), count, data.st_size, multimodal)
        checksums = map_checksums(Path(f"{stem}.crc")) if has_checksums else None
        if checksums is not None and len(checksums) != count:
            raise ValueError(f"{stem}.crc holds {len(checksums)} checksums for {count} sequences; copy it again")
        return cls(str(stem), data.st_mtime_ns, multimodal, checksums, check_all)

    def read(self, number: int, check: bool = False) -> np.ndarray:
        """Return the bytes of one sequence as a uint8 view. ``check`` compares the checksum of a large one, too.

        Raises ValueError if the bytes have changed since they were written.
        """
        stored = open_indexed(self.stem, self.changed, self.multimodal)[number]
        data = stored[0] if self.multimodal else stored
        if check or self.check_all or len(data) <= SMALL_BYTES:
            check_sequence(data, self.checksums, number, self.stem)
        return data


def check_sequence(data: np.ndarray, checksums: np.ndarray | None, number: int, stem: str) -> None:
    """Raise ValueError if the bytes of sequence ``number`` do not have their recorded checksum."""
    if checksums is not None and zlib.crc32(data.data) != checksums[number]:
        raise ValueError(f"its bytes in {stem}.bin do not have the checksum they were written with; copy the file again")


def check_offsets(path: Path, count: int, data_bytes: int, multimodal: bool) -> None:
    """Raise ValueError naming ``path`` if an ``.idx`` does not describe ``count`` sequences that fill ``data_bytes`` without a gap."""
    problem = _offset_problem(path, count, data_bytes, multimodal)
    if problem:
        raise ValueError(f"{path} is damaged ({problem}); copy it again, or make it again")


def sequence_count(path: Path) -> int:
    """Return how many sequences an ``.idx`` says it lists, without checking it. Raises OSError."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(HEADER_BYTES)[18:26], "little")


def _offset_problem(path: Path, count: int, data_bytes: int, multimodal: bool) -> str | None:
    content = path.read_bytes()
    if len(content) < HEADER_BYTES or not content.startswith(_BEGINNING):
        return "it does not begin as an index of bytes does"
    sequences, documents = (int(number) for number in np.frombuffer(content, "<u8", 2, 18))
    if sequences != count:
        return f"it lists {sequences} sequences, expected {count}"
    size = HEADER_BYTES + 12 * sequences + 8 * documents + (sequences if multimodal else 0)
    if len(content) != size:
        return f"it has {len(content)} bytes, expected {size}"
    lengths = np.frombuffer(content, "<i4", count, HEADER_BYTES)
    offsets = np.frombuffer(content, "<i8", count, HEADER_BYTES + 4 * count)
    ends = np.cumsum(lengths, dtype=np.int64)
    if count and (lengths.min() < 0 or offsets[0] != 0 or not np.array_equal(offsets[1:], ends[:-1])):
        return "its offsets and lengths disagree"
    starts = np.frombuffer(content, "<i8", documents, HEADER_BYTES + 12 * count)  # of samples, and the end of the last one
    if not documents or starts[0] != 0 or starts[-1] != count or (starts[1:] < starts[:-1]).any():
        return "the samples that it lists do not follow each other"
    total = int(ends[-1]) if count else 0
    return None if total == data_bytes else f"its sequences fill {total} bytes, the .bin has {data_bytes}"


def write_checksums(stem: Path, checksums: Sequence[int]) -> None:
    """Write the ``.crc`` of a shard: the CRC-32 of every sequence, in order."""
    write_whole(Path(f"{stem}.crc"), np.asarray(checksums, dtype="<u4").tobytes())


def checked_size(stem: Path, ending: str, size: int, remedy: str) -> None:
    """Raise ValueError, ending with ``remedy``, if a file is missing or has not ``size`` bytes (an interrupted copy)."""
    path = Path(f"{stem}.{ending}")
    stat = path.stat() if path.is_file() else None
    if stat is None or stat.st_size != size:
        actual_size = "no file" if stat is None else stat.st_size
        raise ValueError(f"{path} should have {size} bytes but has {actual_size}; {remedy}")
