# SPDX-License-Identifier: Apache-2.0
"""The rules of one row: keys that are null, shapes that exporters write, names that leave their folder, and limits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.data.sources.parse import parse_edit, parse_line, parse_t2i, parse_vlm
from megatron_bagel.data.sources.records import ANSWER_ITEM, IMAGE_ITEM, TEXT_ITEM, BadRow
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.sources.unit import SourceUnit
from tests.data.index_files import png, talk

RED = '{"a": "red"}'


@pytest.fixture
def unit(tmp_path: Path) -> SourceUnit:
    """A file of conversations with the picture a.png in its folder, and one outside."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(0))
    (tmp_path / "outside.png").write_bytes(png(1))
    return SourceUnit("vlm_sft", str(tmp_path / "chat.jsonl"), 0, 0, 1, image_dir=str(tmp_path / "images"))


def reason(parse: Callable[..., object], *values: Any) -> str:
    with pytest.raises(BadRow) as caught:
        parse(*values)
    return str(caught.value)


@pytest.mark.parametrize("video", [None, "", []])
@pytest.mark.parametrize("image", ["a.png", ["a.png"], {"bytes": None, "path": "a.png"}])
def test_a_null_video_is_no_video(image: object, video: object, unit: SourceUnit) -> None:
    assert parse_vlm(talk("<image>\nWhat?", image=image, video=video), unit, 0).images == [png(0)]


@pytest.mark.parametrize("image", [None, "", [], [None], {}])
def test_a_null_image_is_no_image(image: object, unit: SourceUnit) -> None:
    assert parse_vlm(talk("hello", image=image, video=None), unit, 0).images == []
    assert "no frame_sampler_args" in reason(parse_vlm, talk("<video>", image=image, video="a.mp4"), unit, 0)


def test_an_image_goes_before_a_video_as_in_the_original(unit: SourceUnit) -> None:
    assert parse_vlm(talk("<image>what?", image="a.png", video="a.mp4"), unit, 0).images == [png(0)]
    assert "an image and a video" in reason(parse_vlm, talk("<video>what?", image="a.png", video="a.mp4"), unit, 0)


def test_empty_answers_have_no_loss(unit: SourceUnit) -> None:
    turns = [*talk("one", "")["conversations"], *talk("two", " \n")["conversations"], *talk("three", "3")["conversations"]]
    sample = parse_vlm({"conversations": turns}, unit, 0)
    assert sample.texts == ["one", "two", "three", "3"] and sample.structure == [TEXT_ITEM] * 3 + [ANSWER_ITEM]
    assert "no answer" in reason(parse_vlm, talk("one", ""), unit, 0)
    assert "no answer" in reason(parse_vlm, talk("<image>", "  ", image="a.png"), unit, 0)
    assert parse_vlm(talk("", "yes"), unit, 0).structure == [ANSWER_ITEM]
    assert parse_vlm(talk("<image>", "yes", image="a.png"), unit, 0).structure == [IMAGE_ITEM, ANSWER_ITEM]


@pytest.mark.parametrize("name", ["../outside.png", "b/../../outside.png", "/OUTSIDE", "file:///OUTSIDE", "https://example.org/a.png"])
def test_names_that_leave_the_folder_are_refused_without_the_flag(name: str, unit: SourceUnit, tmp_path: Path) -> None:
    name = name.replace("/OUTSIDE", str(tmp_path / "outside.png"))
    assert "leaves the folder" in reason(parse_vlm, talk("<image>", image=name), unit, 0)
    allowed = SourceUnit("vlm_sft", unit.path, 0, 0, 1, image_dir=unit.image_dir, rules=RowRules(allow_outside_root=True))
    if "example" not in name and "b/" not in name:
        assert parse_vlm(talk("<image>", image=name), allowed, 0).images == [png(1)]


def test_names_that_come_back_are_inside(unit: SourceUnit) -> None:
    for name in ("./a.png", "../images/a.png", f"{unit.image_dir}/a.png"):
        assert parse_vlm(talk("<image>", image=name), unit, 0).images == [png(0)]


def test_urls_are_inside_below_a_url() -> None:
    unit = SourceUnit("vlm_sft", "x", 0, 0, 1, image_dir="memory://bucket/images")
    for name in ("../other.png", "%2e%2e/other.png", "memory://bucket/other.png", "memory://bucket/images/../other.png", "/etc/hosts"):
        assert "leaves the folder" in reason(parse_vlm, talk("<image>", image=name), unit, 0)
    assert "cannot be read" in reason(parse_vlm, talk("<image>", image="memory://bucket/images/gone.png"), unit, 0)


@pytest.mark.parametrize("name", ["a\0.png", "b" * 5000 + ".png", "c\ud83d.png", "gone.png", ".", "a.png/b"])
def test_names_that_no_file_has_are_told_in_few_words(name: str, unit: SourceUnit) -> None:
    told = reason(parse_vlm, talk("<image>", image=name), unit, 0)
    assert "cannot be read" in told and len(told) < 700


def test_images_of_hugging_face_are_bytes() -> None:
    struct = {"bytes": png(0), "path": "0.png"}
    assert parse_t2i(struct, RED).images == [png(0)]
    assert parse_edit([struct, png(1)], [["make it blue"]]).images == [png(0), png(1)]
    assert "without bytes" in reason(parse_t2i, {"bytes": None, "path": "0.png"}, RED)
    assert "holds dict" in reason(parse_t2i, {"height": 3}, RED)


def test_a_flat_list_has_one_instruction_for_each_step() -> None:
    flat = parse_edit([png(0), png(1), png(2)], ["a", "b"])
    assert flat == parse_edit([png(0), png(1), png(2)], [["a"], ["b"]]) and flat.structure == [1, 1]
    assert "the flat list has 2" in reason(parse_edit, [png(0), png(1)], ["a", "b"])
    assert "empty instruction for step 1" in reason(parse_edit, [png(0), png(1), png(2)], ["a", " "])
    assert "neither a list of lists" in reason(parse_edit, [png(0), png(1)], ["a", None])


def test_limits_are_those_of_the_flags() -> None:
    rules = RowRules(max_text_bytes=20, max_json_depth=2)
    assert parse_t2i(png(0), RED, rules).texts == ["red"]
    assert "above the limit of 20 (--max_text_bytes of megatron-bagel data build)" in reason(
        parse_t2i, png(0), json.dumps({"a": "x" * 20}), rules
    )
    assert "above the limit of 20" in reason(parse_edit, [png(0), png(1)], [["x" * 21]], rules)
    assert "deeper than 2" in reason(parse_line, b'{"a": [[1]]}', rules)
    for name in ("max_text_bytes", "max_json_depth"):
        with pytest.raises(ValueError, match=re.escape(f"--{name}")):
            RowRules(**{name: 0})


def test_null_captions_are_absent() -> None:
    assert parse_t2i(png(0), '{"a": null, "b": "red"}').texts == ["red"]
    assert "empty caption" in reason(parse_t2i, png(0), '{"a": null}')
