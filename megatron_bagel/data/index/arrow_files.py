# SPDX-License-Identifier: Apache-2.0
"""The only reader of Arrow files: the planning columns of a shard, memory-mapped. Every error names the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from megatron_bagel.common.files import refuse_lfs_pointer
from megatron_bagel.data.index.format import PLANNING_SCHEMA

_REMEDY = "copy or build the index again"


def read_planning_batch(path: Path, is_verified: bool = False) -> pa.RecordBatch:
    """Map the planning columns of a shard.

    Args:
        path: The file.
        is_verified: Whether the bytes were compared with a checksum. Otherwise the columns are checked one by one, which takes as long.

    Raises:
        ValueError: The file cannot be read, is no Arrow file, or has other columns than ``PLANNING_SCHEMA``.
    """
    try:
        if not is_verified:
            refuse_lfs_pointer(path, "index")
        with pa.memory_map(str(path)) as mapped:  # the columns keep the mapping after the file is closed
            batch = pa.ipc.open_file(mapped).get_batch(0)
        if not batch.schema.equals(PLANNING_SCHEMA):
            raise ValueError(f"its columns are {', '.join(batch.schema.names)}, expected {', '.join(PLANNING_SCHEMA.names)}")
        if not is_verified:
            batch.validate(full=True)  # offsets rise and stay within the values
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); {_REMEDY}") from error
    return batch


def map_checksums(path: Path) -> np.ndarray:
    """Map a file of little-endian uint32 without keeping it open. Raises ValueError naming the file."""
    return map_numbers(path, "<u4")


def map_numbers(path: Path, dtype: str, count: int = -1, offset: int = 0) -> np.ndarray:
    """Map ``count`` numbers (-1: all) of a file, which begin at byte ``offset``, without keeping it open. Raises ValueError naming it."""
    try:
        with pa.memory_map(str(path)) as mapped:
            return np.frombuffer(mapped.read_buffer(), dtype, count, offset)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({_first_line(error)}); copy it again") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
