# SPDX-License-Identifier: Apache-2.0
"""Parses one source row of BAGEL's guide: the rules that make a row a sample, or the reason why it is not one.

The rules are the original's, except where it crashes, trains on nothing, or silently drops rows. A key whose value is null or empty
counts as absent.
"""

from __future__ import annotations

from typing import Any

from megatron_bagel.common.json_text import parse_json
from megatron_bagel.data.sources.pictures import SHOWN_NAME, image_bytes, read_file
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, TEXT_ITEM, BadRow, RawSample
from megatron_bagel.data.sources.row_rules import BUILD, DEFAULT_RULES, RowRules
from megatron_bagel.data.sources.stored_videos import video_numbers
from megatron_bagel.data.sources.unit import SourceUnit
from megatron_bagel.data.sources.video import video_frames, video_info

IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"


def parse_t2i(image: Any, captions: Any, rules: RowRules = DEFAULT_RULES) -> RawSample:
    """Parse a T2I row. ``captions`` is a JSON dict of alternatives; as in the original, an empty one means the caption " "."""
    data = image_bytes(image, "image")
    if not isinstance(captions, str):
        raise BadRow(f"column captions holds {type(captions).__name__}, not a JSON string")
    check_text_size([captions], rules)
    try:
        alternatives = parse_json(captions, max_depth=rules.max_json_depth)
    except ValueError as error:
        raise BadRow(f"captions is {error}") from error
    if not isinstance(alternatives, dict) or not all(isinstance(text, str | None) for text in alternatives.values()):
        raise BadRow("captions is not a JSON dict of strings")
    texts = [text for text in alternatives.values() if text and text.strip()]
    if alternatives and not texts:
        raise BadRow("empty caption")
    return RawSample(texts or [" "], [], [data])


def parse_edit(images: Any, instructions: Any, rules: RowRules = DEFAULT_RULES) -> RawSample:
    """Parse a chain of ``images``; ``instructions[i]`` are the alternative instructions for the step from i to i + 1.

    A flat list of instructions has one instruction for each step.
    """
    if not isinstance(images, list):
        raise BadRow("column image_list is not a list of bytes")
    data = [image_bytes(image, "image_list") for image in images]
    if len(data) < 2:
        raise BadRow(f"an edit needs 2 images or more, the row has {len(data)}")
    structure: list[int] = []
    texts: list[str] = []
    for alternatives in _steps(instructions, len(data) - 1):
        usable = [text for text in alternatives if isinstance(text, str) and text.strip()]
        if not usable:
            raise BadRow(f"empty instruction for step {len(structure)}")
        structure.append(len(usable))
        for text in usable:
            texts.extend([text] if len(data) == 2 else [text, f"{text}.", f" {text}."])
    check_text_size(texts, rules)
    return RawSample(texts, structure, data)


def _steps(instructions: Any, steps: int) -> list[list[Any]]:
    """Return the alternatives of each step. A flat list must have exactly one instruction for each, so that none is lost."""
    if isinstance(instructions, list) and instructions and all(isinstance(text, str) for text in instructions):
        if len(instructions) != steps:
            raise BadRow(
                f"{steps + 1} images need {steps} instructions, the flat list has {len(instructions)}; "
                "write a list of alternatives for each step"
            )
        return [[text] for text in instructions]
    if not isinstance(instructions, list) or not all(isinstance(step, list) for step in instructions):
        raise BadRow("column instruction_list is neither a list of lists of strings nor a list of strings")
    if len(instructions) < steps:
        raise BadRow(f"{steps + 1} images need {steps} instructions, the row has {len(instructions)}")
    return instructions[:steps]


def check_text_size(texts: list[str], rules: RowRules) -> None:
    """Raise BadRow if the texts of a row have more bytes together than the rules allow."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    if size > rules.max_text_bytes:
        raise BadRow(f"{size} bytes of text are above the limit of {rules.max_text_bytes} (--max_text_bytes of {BUILD})")


def parse_line(line: bytes, rules: RowRules) -> dict[str, Any]:
    """Parse a line of a jsonl file, which must be one JSON object."""
    try:
        content = parse_json(line, max_depth=rules.max_json_depth)
    except ValueError as error:
        raise BadRow(str(error)) from error
    if not isinstance(content, dict):
        raise BadRow(f"a JSON object was expected, found {type(content).__name__}")
    return content


def parse_text(content: dict[str, Any]) -> RawSample:
    """Parse a plain text, every token of which is learned."""
    text = content.get("text")
    if not isinstance(text, str):
        raise BadRow("no string under 'text'")
    if not text.strip():
        raise BadRow("empty text")
    return RawSample([text], [ANSWER_ITEM], [])


def parse_vlm(content: dict[str, Any], unit: SourceUnit, row: int) -> RawSample:
    """Parse a conversation: human turns are cut at their ``<image>`` marks, answers have a loss, files are read from ``image_dir``.

    The frames of a video replace its ``<video>`` mark as images. As in the original, a video counts only on a line without an image.
    """
    names, video = _image_names(content.get("image")), content.get("video")
    if names and video and VIDEO_MARK in str(content.get("conversations")):
        raise BadRow(f"the line holds an image and a video; only one of them can be read, and the text has a {VIDEO_MARK} mark")
    if video and not names and unit.rules.store_videos:
        return _stored_video(content.get("conversations"), video, unit)
    frames = _frames_of(video, unit, row) if video and not names else []
    texts, structure = conversation(content.get("conversations"), len(frames))
    marks, images = structure.count(IMAGE_ITEM), len(frames) or len(names)
    if marks > images:
        raise BadRow(f"{marks} {IMAGE_MARK} marks but {images} images")
    if ANSWER_ITEM not in structure:
        raise BadRow("no answer, so nothing to learn from")
    return RawSample(texts, structure, frames or [read_file("image", name, unit) for name in names[:marks]])


def _image_names(names: Any) -> list[str]:
    names = names if isinstance(names, list) else [names]
    if all(not name for name in names):
        return []
    names = [name.get("path") if isinstance(name, dict) else name for name in names]
    if not all(isinstance(name, str) for name in names):
        raise BadRow("image is neither a file name nor a list of file names")
    return names


def _stored_video(turns: Any, name: Any, unit: SourceUnit) -> RawSample:
    """Return a conversation about a video, whose bytes are its only image."""
    data = _video_bytes(name, unit)
    try:
        info = video_info(data)
    except ValueError as error:
        raise BadRow(f"video {name[:SHOWN_NAME]}: {error}") from error
    texts, structure = conversation(turns, 1)
    if structure.count(IMAGE_ITEM) > 1:
        raise BadRow(f"{structure.count(IMAGE_ITEM) - 1} {IMAGE_MARK} marks but no images beside the video")
    if ANSWER_ITEM not in structure:
        raise BadRow("no answer, so nothing to learn from")
    mark = structure.index(IMAGE_ITEM)
    return RawSample(texts, [*structure[:mark], *video_numbers(info), *structure[mark + 1 :]], [data])


def _video_bytes(name: Any, unit: SourceUnit) -> bytes:
    if unit.frames is None:
        raise BadRow("the line holds a video, and the group has no frame_sampler_args in the dataset config")
    if not isinstance(name, str):
        raise BadRow("video is not a file name")
    return read_file("video", name, unit)


def _frames_of(name: Any, unit: SourceUnit, row: int) -> list[bytes]:
    data = _video_bytes(name, unit)
    assert unit.frames is not None, "_video_bytes has checked it"
    try:
        return video_frames(data, unit.frames, unit.source, row)
    except ValueError as error:
        raise BadRow(f"video {name[:SHOWN_NAME]}: {error}") from error


def conversation(turns: Any, frames: int = 0) -> tuple[list[str], list[int]]:
    """Return texts and structure; the first ``<video>`` mark stands for ``frames`` images.

    As in the original, texts without tokens are left out. So are answers of white space only.
    """
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
            if value.strip():  # an empty answer would teach the model to stop at once
                texts.append(value)
                structure.append(ANSWER_ITEM)
        elif role != "human":
            raise BadRow(f"a turn is from {role!r}; only human and gpt are known")
        elif IMAGE_MARK not in value:
            if value:
                texts.append(value)
                structure.append(TEXT_ITEM)
        else:
            _add_pieces(value, texts, structure)
    if frames:
        raise BadRow(f"no {VIDEO_MARK} mark for the video")
    return texts, structure


def _add_pieces(value: str, texts: list[str], structure: list[int]) -> None:
    """Cut a human turn at its image marks and append the pieces."""
    for number, piece in enumerate(value.split(IMAGE_MARK)):
        if number:
            structure.append(IMAGE_ITEM)
        if piece.strip():
            texts.append(piece.strip())
            structure.append(TEXT_ITEM)
