# SPDX-License-Identifier: Apache-2.0
"""The unit of reading: a run of rows of one source file, with everything that decides what the rows become."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.sources.video import FrameSampler


@dataclass(frozen=True)
class SourceUnit:
    """A run of rows of one source file: a full parquet or tar file, or the bytes [start, stop) of a jsonl file.

    ``source`` numbers the file among those of its dataset, and ``first_row`` its first row. ``image_dir`` holds a jsonl file's images
    and videos, ``frames`` chooses the frames of a video, and ``rules`` limit the rows. ``row_format`` None stands for the rows of
    BAGEL's guide.
    """

    group: str
    path: str
    source: int
    first_row: int
    rows: int
    start: int = 0
    stop: int = 0
    image_dir: str = ""
    frames: FrameSampler | None = None
    rules: RowRules = RowRules()
    row_format: RowFormat | None = None
