# SPDX-License-Identifier: Apache-2.0
"""The sample that a row makes in a group, whatever container it comes from: rows of other forms than BAGEL's guide has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_bagel.common.json_text import parse_json
from megatron_bagel.data.sources.dataset_config import EDIT, INTERLEAVED, T2I, TEXT, VLM
from megatron_bagel.data.sources.forms import FORMS
from megatron_bagel.data.sources.interleaved import parse_items
from megatron_bagel.data.sources.parse import IMAGE_MARK, check_text_size, conversation, parse_edit, parse_text
from megatron_bagel.data.sources.pictures import Pictures
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, BadRow, RawSample
from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_rules import RowRules

#: Columns that the rows of a group may have; other forms read all columns.
_GROUP_COLUMNS = {
    T2I: ("image", "caption", "captions"),
    EDIT: ("image_list", "instruction_list", "source", "target", "instruction"),
    VLM: ("image", "conversations", "video"),
    TEXT: ("text",),
}


def columns_of(group: str, row_format: RowFormat) -> tuple[str, ...] | None:
    """Return the columns, under our names, that may be read of a row; None stands for all."""
    if group != INTERLEAVED:
        return _GROUP_COLUMNS[group]
    return ("items",) if row_format.name in ("", "items") else None


def sample_of(row: Mapping[str, Any], group: str, pictures: Pictures, row_format: RowFormat, rules: RowRules) -> RawSample:
    """Return the sample that a row makes in a group. Raises BadRow with the reason why it makes none."""
    if group == INTERLEAVED:
        if isinstance(items := row.get("items"), str):
            row = {**row, "items": parse_json(items, "items", rules.max_json_depth)}
        return parse_items(FORMS[row_format.name or "items"](row), pictures, row_format, rules)
    if group == T2I:
        return _t2i(row, pictures, rules)
    if group == EDIT:
        return _edit(row, pictures, rules)
    return parse_text(dict(row)) if group == TEXT else _vlm(row, pictures, rules)


def _t2i(row: Mapping[str, Any], pictures: Pictures, rules: RowRules) -> RawSample:
    captions = row.get("captions", row.get("caption"))
    if "captions" in row and isinstance(captions, str):
        captions = parse_json(captions, "captions", rules.max_json_depth)
    captions = list(captions.values()) if isinstance(captions, dict) else [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(text, str | None) for text in captions):
        raise BadRow("no caption: a string or a list of strings under 'caption', or a JSON dict under 'captions' is expected")
    texts = [text for text in captions if text and text.strip()]
    if not texts:
        raise BadRow("empty caption")
    check_text_size(texts, rules)
    return RawSample(texts, [], [pictures.read(row.get("image"))])


def _edit(row: Mapping[str, Any], pictures: Pictures, rules: RowRules) -> RawSample:
    """Parse a chain (``image_list``, ``instruction_list``) or a pair (``source``, ``target``, ``instruction``)."""
    if "instruction_list" in row:
        images, instructions = row.get("image_list"), row["instruction_list"]
    else:
        images, instruction = [row.get("source"), row.get("target")], row.get("instruction")
        instructions = [instruction] if isinstance(instruction, list) else [[instruction]]
        if None in images or instruction is None:
            raise BadRow("an edit needs image_list and instruction_list, or source, target and instruction")
    if not isinstance(images, list):
        raise BadRow("image_list is not a list of pictures")
    return parse_edit([pictures.read(image) for image in images], instructions, rules)


def _vlm(row: Mapping[str, Any], pictures: Pictures, rules: RowRules) -> RawSample:
    if row.get("video"):
        raise BadRow("the row holds a video, which only the guide's jsonl lines can")
    image = row.get("image")
    images = image if isinstance(image, list) else [] if image is None else [image]
    texts, structure = conversation(row.get("conversations"))
    marks = structure.count(IMAGE_ITEM)
    if marks > len(images):
        raise BadRow(f"{marks} {IMAGE_MARK} marks but {len(images)} images")
    if ANSWER_ITEM not in structure:
        raise BadRow("no answer, so nothing to learn from")
    check_text_size(texts, rules)
    return RawSample(texts, structure, [pictures.read(image) for image in images[:marks]])
