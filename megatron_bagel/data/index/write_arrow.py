# SPDX-License-Identifier: Apache-2.0
"""Writes the planning columns of a shard: one record batch in an Arrow file."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from megatron_bagel.data.index.format import PLANNING_SCHEMA


def write_planning_batch(path: Path, batch: pa.RecordBatch) -> None:
    """Write the planning columns of a shard to ``path``."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, PLANNING_SCHEMA) as writer:
        writer.write_batch(batch)
