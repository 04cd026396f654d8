# SPDX-License-Identifier: Apache-2.0
"""Checks a file of interleaved rows against the schema before an index is built of it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_bagel.data.sources.dataset_config import INTERLEAVED
from megatron_bagel.data.sources.files import absolute
from megatron_bagel.data.sources.records import BadRow
from megatron_bagel.data.sources.row_format import Container, RowFormat
from megatron_bagel.data.sources.row_rules import DEFAULT_RULES, RowRules
from megatron_bagel.data.sources.rows import check_parquet, read_unit, scan_jsonl
from megatron_bagel.data.sources.tar_files import count_tar_samples
from megatron_bagel.data.sources.unit import SourceUnit
from megatron_bagel.data.transforms import complete_size

_ROWS_PER_UNIT = 1 << 20
ENDINGS: dict[str, Container] = {".jsonl": "jsonl", ".parquet": "parquet", ".tar": "tar"}


def row_problems(path: str, form: str, image_dir: str, check_images: bool = True, rules: RowRules = DEFAULT_RULES) -> Iterator[str | None]:
    """Yield for every row of a file a sentence if it is no sample, and None if it is one.

    Args:
        path: The file, whose ending says what it holds.
        form: The form of its rows.
        image_dir: The folder of the pictures that rows name.
        check_images: Whether every picture must decode.
        rules: The limits and permissions that the build will get.

    Raises ValueError if the file cannot be read as what its name says.
    """
    container = next(container for ending, container in ENDINGS.items() if path.endswith(ending))
    for unit in _units(absolute(path), RowFormat(container, form), absolute(image_dir), rules):
        for row, sample in read_unit(unit):
            problem = str(sample) if isinstance(sample, BadRow) else _image_problem(sample.images) if check_images else None
            yield f"{path}, row {row}: {problem}" if problem else None


def _units(path: str, row_format: RowFormat, image_dir: str, rules: RowRules) -> list[SourceUnit]:
    if row_format.container == "jsonl":
        return scan_jsonl(path, INTERLEAVED, image_dir, None, _ROWS_PER_UNIT, rules, row_format)
    try:
        rows = count_tar_samples(path) if row_format.container == "tar" else check_parquet(path, INTERLEAVED, row_format)
    except BadRow as error:
        raise ValueError(f"{path}: {error}") from error
    return [SourceUnit(INTERLEAVED, path, 0, 0, rows, rules=rules, row_format=row_format)]


def _image_problem(images: list[bytes]) -> str | None:
    for number, data in enumerate(images):
        try:
            complete_size(data)
        except ValueError as error:
            return f"image {number}: {error}"
    return None
