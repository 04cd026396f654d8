"""Reads the source files of BAGEL's guide row by row: each row is a sample, or a reason why it is not one.

No reader raises for a bad row: the reason goes into the index's list of skipped rows. The rules are the original's, except where
it crashes, trains on nothing, or silently drops rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_bagel.data.sources.dataset_config import EDIT, T2I, TEXT
from megatron_bagel.data.sources.files import join, open_raw, read_raw
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, TEXT_ITEM, RawSample
from megatron_bagel.data.sources.video import FrameSampler, video_frames

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
PARQUET_COLUMNS = {T2I: ("image", "captions"), EDIT: ("image_list", "instruction_list")}


class BadRow(ValueError):
    """The reason why a row is not in the index."""


@dataclass(frozen=True)
class SourceUnit:
    """A run of rows of one source file: a full parquet file, or the bytes [start, stop) of a jsonl file.

    ``source`` numbers the file among those of its dataset, and ``first_row`` its first row. ``image_dir`` holds a jsonl file's images
    and videos, and ``frames`` chooses the frames of a video.
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


def read_unit(unit: SourceUnit) -> Iterator[tuple[int, RawSample | BadRow]]:
    """Yield the rows of ``unit`` in file order: (row number in the file, sample or reason). A truncated file ends with a reason."""
    if unit.group in PARQUET_COLUMNS:
        yield from _read_parquet(unit)
    else:
        yield from _read_jsonl(unit)


def check_parquet(path: str, group: str) -> int:
    """Return the number of rows in a parquet file's footer. Raises BadRow if it is not parquet or lacks a required column."""
    try:
        file = pq.ParquetFile(open_raw(path))
    except (pa.ArrowInvalid, OSError) as error:
        raise BadRow(f"not a readable parquet file ({_first_line(error)})") from error
    with file:
        missing_columns = [name for name in PARQUET_COLUMNS[group] if name not in file.schema_arrow.names]
        if missing_columns:
            raise BadRow(f"no column {', '.join(missing_columns)}; the file has {', '.join(file.schema_arrow.names)}")
        return file.metadata.num_rows


def _read_parquet(unit: SourceUnit) -> Iterator[tuple[int, RawSample | BadRow]]:
    parse = parse_t2i if unit.group == T2I else parse_edit
    row = unit.first_row
    try:
        with open_raw(unit.path) as raw, pq.ParquetFile(raw) as file:
            for batch in file.iter_batches(batch_size=64, columns=list(PARQUET_COLUMNS[unit.group])):
                for first_value, second_value in zip(batch.column(0), batch.column(1), strict=True):
                    try:
                        sample: RawSample | BadRow = parse(first_value.as_py(), second_value.as_py())
                    except BadRow as error:
                        sample = error
                    yield row, sample
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        yield row, BadRow(f"the file cannot be read from here on ({_first_line(error)})")


def _read_jsonl(unit: SourceUnit) -> Iterator[tuple[int, RawSample | BadRow]]:
    with open_raw(unit.path) as file:
        file.seek(unit.start)
        row = unit.first_row
        while file.tell() < unit.stop:
            line = file.readline()
            if line.strip():
                try:
                    content = _json_object(line)
                    sample: RawSample | BadRow = parse_text(content) if unit.group == TEXT else parse_vlm(content, unit, row)
                except BadRow as error:
                    sample = error
                yield row, sample
            row += 1


def parse_t2i(image: Any, captions: Any) -> RawSample:
    """Parse a T2I row. ``captions`` is a JSON dict of alternatives; as in the original, an empty one means the caption " "."""
    if not isinstance(image, bytes):
        raise BadRow(f"column image holds {type(image).__name__}, not bytes")
    if not isinstance(captions, str):
        raise BadRow(f"column captions holds {type(captions).__name__}, not a JSON string")
    try:
        alternatives = json.loads(captions)
    except json.JSONDecodeError as error:
        raise BadRow(f"captions is not JSON ({error})") from error
    if not isinstance(alternatives, dict) or not all(isinstance(text, str) for text in alternatives.values()):
        raise BadRow("captions is not a JSON dict of strings")
    texts = [text for text in alternatives.values() if text.strip()]
    if alternatives and not texts:
        raise BadRow("empty caption")
    return RawSample(texts or [" "], [], [image])


def parse_edit(images: Any, instructions: Any) -> RawSample:
    """Parse a chain of ``images``; ``instructions[i]`` are the alternative instructions for the step from i to i + 1."""
    if not isinstance(images, list) or not all(isinstance(image, bytes) for image in images):
        raise BadRow("column image_list is not a list of bytes")
    if not isinstance(instructions, list) or not all(isinstance(step, list) for step in instructions):
        raise BadRow("column instruction_list is not a list of lists of strings")
    if len(images) < 2:
        raise BadRow(f"an edit needs 2 images or more, the row has {len(images)}")
    if len(instructions) < len(images) - 1:
        raise BadRow(f"{len(images)} images need {len(images) - 1} instructions, the row has {len(instructions)}")
    texts: list[str] = []
    structure: list[int] = []
    for step in instructions[: len(images) - 1]:
        usable = [text for text in step if isinstance(text, str) and text.strip()]
        if not usable:
            raise BadRow(f"empty instruction for step {len(structure)}")
        structure.append(len(usable))
        for text in usable:
            texts.extend([text] if len(images) == 2 else [text, f"{text}.", f" {text}."])
    return RawSample(texts, structure, images)


def parse_vlm(content: dict[str, Any], unit: SourceUnit, row: int) -> RawSample:
    """Parse a conversation: human turns are cut at their ``<image>`` marks, answers have a loss, files are read from ``image_dir``.

    The frames of a video replace its ``<video>`` mark as images.
    """
    is_video = "video" in content
    names = [] if is_video else _image_names(content.get("image") or [])
    frames = _frames_of(content["video"], unit, row) if is_video else []
    texts, structure = _conversation(content.get("conversations"), len(frames))
    marks, images = structure.count(IMAGE_ITEM), len(frames) if is_video else len(names)
    if marks > images:
        raise BadRow(f"{marks} {IMAGE_MARK} marks but {images} images")
    if ANSWER_ITEM not in structure:
        raise BadRow("no answer, so nothing to learn from")
    return RawSample(texts, structure, frames or [_read_file("image", join(unit.image_dir, name)) for name in names[:marks]])


def _image_names(names: Any) -> list[str]:
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadRow("image is neither a file name nor a list of file names")
    return names


def _frames_of(name: Any, unit: SourceUnit, row: int) -> list[bytes]:
    if unit.frames is None:
        raise BadRow("the line holds a video, and the group has no frame_sampler_args in the dataset config")
    if not isinstance(name, str):
        raise BadRow("video is not a file name")
    try:
        return video_frames(_read_file("video", join(unit.image_dir, name)), unit.frames, unit.source, row)
    except BadRow:
        raise
    except ValueError as error:
        raise BadRow(f"video {name}: {error}") from error


def _conversation(turns: Any, frames: int = 0) -> tuple[list[str], list[int]]:
    """Return texts and structure; the first ``<video>`` mark stands for ``frames`` images."""
    if not isinstance(turns, list) or not turns:
        raise BadRow("conversations is missing or empty")
    texts: list[str] = []
    structure: list[int] = []
    for turn in turns:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRow("a turn of conversations has no text in 'value'")
        value, role = turn["value"], turn.get("from")
        if frames and role == "human" and VIDEO_MARK in value:
            value, frames = value.replace(VIDEO_MARK, IMAGE_MARK * frames, 1), 0
        if role == "gpt":
            texts.append(value)
            structure.append(ANSWER_ITEM)
        elif role != "human":
            raise BadRow(f"a turn is from {role!r}; only human and gpt are known")
        elif IMAGE_MARK not in value:
            texts.append(value)
            structure.append(TEXT_ITEM)
        else:
            for number, piece in enumerate(value.split(IMAGE_MARK)):
                if number:
                    structure.append(IMAGE_ITEM)
                if piece.strip():
                    texts.append(piece.strip())
                    structure.append(TEXT_ITEM)
    if frames:
        raise BadRow(f"no {VIDEO_MARK} mark for the video")
    return texts, structure


def parse_text(content: dict[str, Any]) -> RawSample:
    """Parse a plain text, every token of which is learned."""
    text = content.get("text")
    if not isinstance(text, str):
        raise BadRow("no string under 'text'")
    if not text.strip():
        raise BadRow("empty text")
    return RawSample([text], [ANSWER_ITEM], [])


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadRow(f"not JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadRow(f"a JSON object was expected, found {type(content).__name__}")
    return content


def _read_file(kind: str, location: str) -> bytes:
    try:
        return read_raw(location)
    except OSError as error:
        raise BadRow(f"{kind} {location} cannot be read ({error.strerror or _first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def scan_jsonl(path: str, group: str, image_dir: str, frames: FrameSampler | None, rows_per_unit: int) -> list[SourceUnit]:
    """Cut a jsonl file into units of ``rows_per_unit`` lines (the last may be shorter) in one pass over its bytes."""
    units: list[SourceUnit] = []
    start = position = first_row = row = 0

    def add_unit() -> None:
        units.append(SourceUnit(group, path, 0, first_row, row - first_row, start, position, image_dir, frames))

    with open_raw(path) as file:
        for line in file:
            position += len(line)
            row += 1
            if row - first_row == rows_per_unit:
                add_unit()
                start, first_row = position, row
    if row > first_row:
        add_unit()
    return units
