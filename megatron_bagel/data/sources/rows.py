# SPDX-License-Identifier: Apache-2.0
"""Reads source files row by row: each row is a sample, or a reason why it is not one.

parse.py has the rules of BAGEL's guide, row_samples.py those of other forms (a unit with a ``row_format``).

No reader raises for a bad row, whatever is in it: the reason goes into the index's list of skipped rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bagel.common.json_text import check_encodable, head_of, wrong_container
from megatron_bagel.data.sources.dataset_config import EDIT, T2I, TEXT
from megatron_bagel.data.sources.files import open_raw
from megatron_bagel.data.sources.parse import parse_edit, parse_line, parse_t2i, parse_text, parse_vlm
from megatron_bagel.data.sources.pictures import Pictures
from megatron_bagel.data.sources.records import BadRow, RawSample, bad_row
from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_rules import BUILD, DEFAULT_RULES, RowRules
from megatron_bagel.data.sources.row_samples import columns_of, sample_of
from megatron_bagel.data.sources.tar_files import read_tar
from megatron_bagel.data.sources.unit import SourceUnit
from megatron_bagel.data.sources.video import FrameSampler

PARQUET_COLUMNS = {T2I: ("image", "captions"), EDIT: ("image_list", "instruction_list")}
_PARQUET_BATCH = 16  # rows in memory at a time; rows of many megabytes are read with fewer
_PIECE = 1 << 20  # bytes of a line in memory at a time while lines are counted


def read_unit(unit: SourceUnit) -> Iterator[tuple[int, RawSample | BadRow]]:
    """Yield the rows of ``unit`` in file order: (row number in the file, sample or reason). A truncated file ends with a reason.

    Raises ValueError naming file and row if a jsonl file cannot be read any more, or if memory runs out.
    """
    container = unit.row_format.container if unit.row_format else "parquet" if unit.group in PARQUET_COLUMNS else "jsonl"
    if container == "parquet":
        yield from _read_parquet(unit)
    elif container == "tar":
        for row, parse in read_tar(unit):
            yield row, parse if isinstance(parse, BadRow) else _sample(unit, row, parse)
    else:
        yield from _read_jsonl(unit)


def _sample(unit: SourceUnit, row: int, parse: Callable[[], RawSample]) -> RawSample | BadRow:
    """Return the sample that ``parse`` makes of a row, or the reason why it makes none, whatever it raises."""
    try:
        sample = parse()
        for text in sample.texts:
            check_encodable(text)
        return sample
    except MemoryError as error:
        raise ValueError(f"{unit.path}, row {row}: memory ran out while the row was read; use fewer worker processes") from error
    except Exception as error:  # a decoder, or the client of a remote file system, may raise anything
        return bad_row(error)


def check_parquet(path: str, group: str, row_format: RowFormat | None = None) -> int:
    """Return the number of rows in a parquet file's footer. Raises BadRow if it is not parquet or lacks a required column."""
    try:
        file = pq.ParquetFile(open_raw(path))
    except (pa.ArrowException, OSError) as error:
        raise BadRow(f"not a readable parquet file ({_first_line(error)})") from error
    with file:
        names = file.schema_arrow.names
        needed = PARQUET_COLUMNS[group] if row_format is None else [theirs for _, theirs in row_format.columns]
        missing_columns = [name for name in needed if name not in names]
        if row_format is not None and not missing_columns and not _columns_in(file, group, row_format):
            missing_columns = list(columns_of(group, row_format) or ())
        if missing_columns:
            raise BadRow(f"no column {', '.join(missing_columns)}; the file has {', '.join(names)}")
        return file.metadata.num_rows


def _read_parquet(unit: SourceUnit) -> Iterator[tuple[int, RawSample | BadRow]]:
    row = unit.first_row
    try:
        with open_raw(unit.path) as raw, pq.ParquetFile(raw) as file:
            columns = PARQUET_COLUMNS[unit.group] if unit.row_format is None else _columns_in(file, unit.group, unit.row_format)
            for cells in _parquet_cells(file, columns):
                yield row, _sample(unit, row, partial(_parse_cells, columns, cells, unit))
                row += 1
    except (pa.ArrowException, OSError) as error:
        yield row, BadRow(f"the file cannot be read from here on ({_first_line(error)})")


def _columns_in(file: pq.ParquetFile, group: str, row_format: RowFormat) -> list[str]:
    """Return the columns of a file that a row may need."""
    wanted = columns_of(group, row_format)
    names = None if wanted is None else {row_format.name_in_file(column) for column in wanted}
    return [name for name in file.schema_arrow.names if names is None or name in names]


def _parquet_cells(file: pq.ParquetFile, columns: Sequence[str]) -> Iterator[tuple[pa.Scalar, ...]]:
    """Yield the cells of some columns row by row, in smaller batches after Arrow could not hold the values of one (2 GiB)."""
    batch_rows, num_yielded = _PARQUET_BATCH, 0
    while True:
        start = 0
        try:
            # No threads: those of Arrow that read through a Python file can keep a process from ending (apache/arrow#50482).
            for batch in file.iter_batches(batch_size=batch_rows, columns=list(columns), use_threads=False):
                arrays = [batch.column(name) for name in columns]
                for index in range(max(0, num_yielded - start), len(batch)):
                    num_yielded += 1
                    yield tuple(array[index] for array in arrays)
                start += len(batch)
            return
        except (pa.ArrowNotImplementedError, pa.ArrowCapacityError):
            if batch_rows == 1:
                raise
            batch_rows //= 4


def _read_jsonl(unit: SourceUnit) -> Iterator[tuple[int, RawSample | BadRow]]:
    row, limit = unit.first_row, unit.rules.max_text_bytes
    try:
        with open_raw(unit.path) as file:
            file.seek(unit.start)
            while file.tell() < unit.stop:
                line = file.readline(limit + 1)
                if not line:
                    raise ValueError(f"{unit.path}, row {row}: the file has become shorter; run the build again")
                if len(line) > limit and not line.endswith(b"\n"):
                    size = len(line) + _skip_rest(file)
                    yield row, BadRow(f"the line has {size} bytes, above the limit of {limit} (--max_text_bytes of {BUILD})")
                elif line.strip():
                    yield row, _sample(unit, row, partial(_parse_line, line, unit, row))
                row += 1
    except OSError as error:
        raise ValueError(f"{unit.path}, row {row}: the file cannot be read any more ({_first_line(error)}); run the build again") from error


def _skip_rest(file: BinaryIO) -> int:
    """Read to the end of the line in pieces and return the number of bytes."""
    size = 0
    while piece := file.readline(_PIECE):
        size += len(piece)
        if piece.endswith(b"\n"):
            break
    return size


def _parse_cells(columns: Sequence[str], cells: Sequence[pa.Scalar], unit: SourceUnit) -> RawSample:
    if unit.row_format is not None:
        row = {name: cell.as_py() for name, cell in zip(columns, cells, strict=True)}
        return sample_of(unit.row_format.renamed(row), unit.group, Pictures(unit), unit.row_format, unit.rules)
    first, second = cells
    return (parse_t2i if unit.group == T2I else parse_edit)(first.as_py(), second.as_py(), unit.rules)


def _parse_line(line: bytes, unit: SourceUnit, row: int) -> RawSample:
    content = parse_line(line, unit.rules)
    if unit.row_format is not None:
        return sample_of(unit.row_format.renamed(content), unit.group, Pictures(unit), unit.row_format, unit.rules)
    return parse_text(content) if unit.group == TEXT else parse_vlm(content, unit, row)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def scan_jsonl(
    path: str, group: str, image_dir: str, frames: FrameSampler | None, rows_per_unit: int, rules: RowRules = DEFAULT_RULES,
    row_format: RowFormat | None = None,
) -> list[SourceUnit]:  # fmt: skip
    """Cut a jsonl file into units of ``rows_per_unit`` lines (the last may be shorter) in one pass over its bytes.

    Raises ValueError if the file is no jsonl file but, for example, compressed or one JSON list.
    """
    units: list[SourceUnit] = []
    start = position = first_row = row = 0

    def add_unit() -> None:
        units.append(SourceUnit(group, path, 0, first_row, row - first_row, start, position, image_dir, frames, rules, row_format))

    with open_raw(path) as file:
        if problem := wrong_container(head_of(file)):
            raise ValueError(f"{path} {problem}")
        for length in _line_lengths(file):
            position += length
            row += 1
            if row - first_row == rows_per_unit:
                add_unit()
                start, first_row = position, row
    if row > first_row:
        add_unit()
    return units


def _line_lengths(file: BinaryIO) -> Iterator[int]:
    """Yield the bytes of each line, its end included, without holding a long line in memory."""
    length = 0
    while piece := file.readline(_PIECE):
        length += len(piece)
        if piece.endswith(b"\n"):
            yield length
            length = 0
    if length:
        yield length
