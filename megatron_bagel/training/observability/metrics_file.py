# SPDX-License-Identifier: Apache-2.0
"""``metrics.jsonl``: one JSON object per logged step, in complete lines, without a repeated step after a resume."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_bagel.common.files import write_whole
from megatron_bagel.common.json_files import whole_lines


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the step records of complete lines. Raises ValueError for a broken line, and for one that is no step record."""
    for number, record in whole_lines(path, "move the file away or repair that line."):
        if "step" not in record:
            raise ValueError(
                f"{path}, line {number} is not a step record, because it has no 'step'. Move the file away if another program wrote it"
            )
        yield record


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return all records of a run in their order. Raises ValueError with the line number if the file is damaged before its end."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run has not logged a step yet, or this is not its results_dir")
    return list(_records(path))


class MetricsFile:
    """Appends records and flushes each one, so that a killed run keeps all its records.

    ``next_step`` is the first step that this run will log. Records of this and later steps, from a run that continued past the
    checkpoint now resumed from, are removed first. Every record names the run if ``run_id`` does.
    """

    def __init__(self, path: str | os.PathLike[str], next_step: int, run_id: str = "") -> None:
        self.path = Path(path)
        self._run = {"run": run_id} if run_id else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._truncate(next_step)
        self._file = self.path.open("a", encoding="utf-8")

    def _truncate(self, next_step: int) -> None:
        earlier_records = [record for record in _records(self.path) if record["step"] < next_step]
        write_whole(self.path, "".join(json.dumps(record) + "\n" for record in earlier_records))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record of plain JSON values. Floats keep all their digits."""
        self._file.write(json.dumps({**record, **self._run}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
