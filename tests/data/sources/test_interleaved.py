# SPDX-License-Identifier: Apache-2.0
"""The schema of interleaved items: what it stores, and a reason with the number of the item for everything else."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_bagel.data.sources.interleaved import MAX_ITEMS, parse_items
from megatron_bagel.data.sources.pictures import Pictures
from megatron_bagel.data.sources.records import BadRow, RawSample
from megatron_bagel.data.sources.row_format import RowFormat
from megatron_bagel.data.sources.row_rules import DEFAULT_RULES, RowRules
from megatron_bagel.data.sources.stored_items import LOSS, VAE, VIT, StoredItem, drop_code, stored_items, structure_problem
from megatron_bagel.data.sources.unit import SourceUnit
from tests.data.index_files import png

PICTURES = Pictures(SourceUnit("interleaved", "x.jsonl", 0, 0, 1))
LEARNED = {"text": "yes", "loss": True}
BOTH = RowFormat("jsonl")


def parse(*items: Any, row_format: RowFormat = BOTH, rules: RowRules = DEFAULT_RULES) -> RawSample:
    return parse_items(list(items), PICTURES, row_format, rules)


def test_items_are_stored_as_numbers() -> None:
    sample = parse(
        {"type": "text", "text": ["look", "see"], "role": "user", "droppable": 0.25},
        {"image": {"bytes": png(1), "path": None}, "role": "user", "droppable": {"vae": True}, "loss": None},
        {"image": png(2), "role": "assistant", "next_token": "<|im_start|>"},
        {"image": [png(3), png(4)], "frame_delta": 2},
        {"type": "text", "text": "done", "role": "assistant"},
    )
    assert sample.texts == ["look", "see", "done"] and sample.images == [png(i) for i in (1, 2, 3, 4)]
    assert stored_items(sample.structure) == [
        StoredItem(0, 2, 0, drop_code(0.25), role=2),
        StoredItem(1, 1, VAE | VIT, 1, 0, role=2),
        StoredItem(1, 1, LOSS | VAE | VIT, next_token=1, role=3),
        StoredItem(1, 2, VAE, frame_delta=2),
        StoredItem(0, 1, LOSS, role=3),
    ]
    assert structure_problem(sample.structure, 3, 4) is None


def test_conditions_follow_the_transforms_of_the_group() -> None:
    no_vae, no_vit = RowFormat("jsonl", has_vae=False), RowFormat("jsonl", has_vit=False)
    image = {"image": png(0)}
    assert stored_items(parse(image, LEARNED, row_format=no_vae).structure)[0].flags == VIT
    assert stored_items(parse(image, LEARNED, row_format=no_vit).structure)[0].flags == VAE
    assert stored_items(parse({**image, "loss": True}).structure)[0].flags == LOSS
    assert stored_items(parse({**image, "loss": True, "condition": "vit"}).structure)[0].flags == LOSS | VIT


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        ({"type": "audio", "text": "x"}, "item 1: type 'audio' is unknown; use text or image"),
        ({"text": "x", "captoin": 1}, "item 1: key 'captoin' does not belong to text items"),
        ({"text": "x", "condition": ["vae"]}, "item 1: key 'condition' does not belong to text items"),
        ("x", "item 1: an object was expected, found str"),
        ({"text": "x", "role": "robot"}, "item 1: role 'robot' is unknown; use one of none, system, user, assistant"),
        ({"text": "x", "loss": "yes"}, "item 1: loss must be true or false"),
        ({"text": " ", "loss": True}, "item 1: a text or one of its alternatives is empty"),
        ({"text": ["a", ""]}, "item 1: a text or one of its alternatives is empty"),
        ({"text": []}, "item 1: a text or one of its alternatives is empty"),
        ({"text": ["a", 3]}, "item 1: text is neither a string nor a list"),
        ({"text": "x", "loss": True, "droppable": True}, "item 1: a text with loss cannot be droppable"),
        ({"text": "x", "droppable": 1.5}, "item 1: droppable must be true, false or a probability"),
        ({"text": "x", "next_token": "<image>"}, "item 1: next_token '<image>' is unknown"),
        ({}, "item 1: no picture under 'image'"),
        ({"image": 3}, "item 1: an image is a file name, bytes or {bytes, path}, not int"),
        ({"image": "a.png"}, "item 1: image a.png is a file name, and the dataset has no folder of images"),
        ({"image": {"bytes": None, "path": "a.png"}}, "item 1: an image {bytes, path} without bytes"),
        ({"image": png(0), "condition": []}, "item 1: a picture without loss needs a condition"),
        ({"image": png(0), "condition": ["clip"]}, "item 1: condition ['clip'] is unknown"),
        (
            {"image": png(0), "role": "user", "loss": True, "condition": ["vit"]},
            'item 1: a user\'s picture with loss needs "vae" in its condition',
        ),
        ({"image": png(0), "droppable": {"text": 0.1}}, "item 1: droppable names the condition 'text'"),
        ({"image": [png(0), png(1)]}, "item 1: a list of several frames and frame_delta go together"),
        ({"image": [png(0), png(1)], "frame_delta": 0}, "item 1: frame_delta must be a whole number of at least 1"),
        ({"image": [png(0), png(1)], "frame_delta": 1, "condition": ["vit"]}, 'item 1: a clip has the condition "vae" or none'),
        ({"image": [png(0), png(1)], "frame_delta": 1, "droppable": True}, "item 1: a clip cannot be droppable"),
    ],
)
def test_a_bad_item_is_named(item: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=re.escape(reason)):
        parse(LEARNED, item, {"text": "later"})


@pytest.mark.parametrize(
    ("row_format", "item", "key"),
    [
        (RowFormat("jsonl", has_vae=False), {"image": png(0), "loss": True}, "image_transform_args"),
        (RowFormat("jsonl", has_vae=False), {"image": png(0), "condition": ["vae"]}, "image_transform_args"),
        (RowFormat("jsonl", has_vit=False), {"image": png(0), "condition": ["vit"]}, "vit_image_transform_args"),
        (RowFormat("jsonl", has_vae=False, has_vit=False), {"image": png(0)}, "vit_image_transform_args"),
    ],
)
def test_a_picture_without_a_transform_is_named(row_format: RowFormat, item: dict[str, Any], key: str) -> None:
    with pytest.raises(BadRow, match=rf"item 0: a picture .* has no transform; give the group {key}"):
        parse(item, LEARNED, row_format=row_format)


def test_rows_that_are_no_samples() -> None:
    for items, reason in (
        ([], "no list of items"),
        ([{"text": "x"}], "no item has a loss"),
        ([LEARNED] * (MAX_ITEMS + 1), "no pack holds"),
    ):
        with pytest.raises(BadRow, match=reason):
            parse(*items)
    with pytest.raises(BadRow, match="above the limit of 3"):
        parse({"text": "four", "loss": True}, rules=RowRules(max_text_bytes=3))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s[:-1], "structure of 23 numbers, expected 8 per item"),
        (lambda s: [7, *s[1:]], "item 0: kind 7 is unknown"),
        (lambda s: [*s[:8], 0, 1, 6, *s[11:]], "item 1: a text with the flags of an image"),
        (lambda s: [0, 3, *s[2:]], "the items have 4 texts and 1 images, stored are 2 and 1"),
        (lambda s: [*s[:3], 2_000_000, *s[4:]], "item 0: a dropout probability is out of range"),
        (lambda s: [*s[:9], 2, *s[10:]], "item 1: a clip without frame_delta"),
        (lambda s: [*s[:10], 0, *s[11:]], "item 1: a picture that is neither drawn nor a condition"),
        (lambda s: [*s[:5], 9, *s[6:]], "item 0: a number is out of range"),
    ],
)
def test_damaged_structure_is_described(change: Any, problem: str) -> None:
    structure = parse({"text": "q"}, {"image": png(0)}, LEARNED).structure
    assert structure_problem(structure, 2, 1) is None
    assert (structure_problem(change(structure), 2, 1) or "").startswith(problem)
