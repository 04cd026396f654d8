# SPDX-License-Identifier: Apache-2.0
"""JSONL in: every kind of bad line is refused with its file and number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_bagel.common.text_limits import MAX_TEXT_BYTES, TextLimits
from megatron_bagel.inference.batch.prompts import make_prompt, read_image, read_prompts


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_lines_override_the_command_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a red circle"},
        "",
        {"id": "b", "task": "understand", "prompt": "what?", "image": "x.png", "seed": 4},
        {"task": "interleave", "terms": [{"text": "a"}, {"image": "y.png"}], "output": "text", "size": [16, 32], "think": False},
    )
    first, second, third = read_prompts(path, "t2i", {"think": True, "size": (8, 8)})
    assert (first.name, first.task, first.output, first.think, first.size) == ("00000", "t2i", "image", True, (8, 8))
    assert (second.name, second.output, second.seed) == ("b", "text", 4)
    assert second.terms == (("image", str(tmp_path / "x.png")), ("text", "what?"))
    assert third.terms == (("text", "a"), ("image", str(tmp_path / "y.png"))) and (third.output, third.size) == ("text", (16, 32))
    assert third.think is False


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is not valid JSON"),
        ([1], "expected an object"),
        ({"prompt": "a", "imge": "x"}, "unknown key imge"),
        ({"prompt": "a", "task": "draw"}, "task 'draw' is unknown"),
        ({"prompt": " "}, "needs a prompt that is not empty"),
        ({"prompt": "a", "image": "x.png"}, "t2i takes no image"),
        ({"prompt": "a", "task": "edit"}, "edit needs an image"),
        ({"prompt": "a", "size": [1]}, "expected \\[height, width\\]"),
        ({"task": "interleave"}, "needs terms"),
        ({"task": "interleave", "terms": [{"text": "a"}], "output": ["text", "sound"]}, "'sound'. is unknown"),
        ({"task": "interleave", "terms": [{"text": "a"}], "output": ["text", "image"], "think": True}, "exclude each other"),
        ({"prompt": "a", "output": ["text", "image"]}, "use task interleave to choose"),
        ({"task": "interleave", "terms": [{"video": "x"}]}, "a term is"),
        ({"prompt": "a", "id": "../x"}, "cannot name a file"),
        ({"prompt": "a", "output": "text"}, "t2i gives image, not text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: object, said: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "fine"}, line)
    with pytest.raises(ValueError, match=f"line 2.*{said}"):
        read_prompts(path, "t2i", {})


def test_files_as_a_whole_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl", "t2i", {})
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(write(tmp_path / "e.jsonl", ""), "t2i", {})
    with pytest.raises(ValueError, match="'a' occurs more than once"):
        read_prompts(write(tmp_path / "d.jsonl", {"prompt": "x", "id": "a"}, {"prompt": "y", "id": "a"}), "t2i", {})


def test_images_are_read_as_rgb_and_bad_ones_named(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad.png"):
        read_image(tmp_path / "bad.png")
    with pytest.raises(ValueError, match="00000: image .*gone.png does not exist"):
        make_prompt("00000", "edit", ["x"], [str(tmp_path / "gone.png")]).check_files()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a red circle \ud83d"}, "lone surrogate U\\+D83D"),
        ({"prompt": "x" * MAX_TEXT_BYTES}, r"the line has \d+ bytes, above the limit of 4194304 \(--max_text_bytes\)"),
        ({"prompt": 7}, "expected a text, got int"),
        ({"prompt": "a", "id": "half \ud83d"}, "lone surrogate"),
        ({"prompt": "a", "system_prompt": "half \ud83d"}, "lone surrogate"),
        ({"prompt": "a", "task": "edit", "image": [7]}, "neither a path nor a list"),
        ({"prompt": "a", "task": "edit", "image": {"path": "x.png"}}, "neither a path nor a list"),
        ({"prompt": "a", "seed": "seven"}, "expected a whole number"),
        ({"prompt": "a", "think": "yes"}, "expected true or false"),
        ({"task": "interleave", "terms": {"text": "a"}}, "terms is not a list"),
        ({"task": "interleave", "terms": [{"text": None}]}, "expected a text"),
        ("[" * 5000, "nested deeper than 100 levels"),
        ('{"prompt": "a", "seed": ' + "7" * 5000 + "}", "a number that cannot be read"),
        (b'{"prompt": "\xe9"}', "not UTF-8"),
    ],
)
def test_lines_that_no_reader_should_die_of_are_named(tmp_path: Path, line: object, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'{"prompt": "fine"}\n' + (line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode())
    )
    with pytest.raises(ValueError, match=f"p.jsonl, line 2.*{said}"):
        read_prompts(path, "t2i", {})


def test_limits_are_those_of_the_flags(tmp_path: Path) -> None:
    limits = TextLimits(max_text_bytes=40, max_json_depth=2)
    path = write(tmp_path / "p.jsonl", {"prompt": "short"}, {"prompt": "\u00e9" * 15})
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: the line has 10\d bytes, above the limit of 40 \(--max_text_bytes\)"):
        read_prompts(path, "t2i", {}, limits)
    with pytest.raises(ValueError, match="d.jsonl, line 1 is not valid JSON .JSON nested deeper than 2 levels"):
        read_prompts(write(tmp_path / "d.jsonl", {"terms": [{"text": "a"}]}), "interleave", {}, limits)
    assert make_prompt("00000", "t2i", ["\u00e9" * 20], [], limits=limits)
    with pytest.raises(ValueError, match=r"00000: a text has 42 bytes, above the limit of 40 \(--max_text_bytes\)"):
        make_prompt("00000", "t2i", ["\u00e9" * 21], [], limits=limits)


def test_null_keys_are_absent_and_lines_end_where_json_says(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    nulls = dict.fromkeys(("image", "task", "id", "think", "size", "seed", "system_prompt", "terms", "output"))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"prompt": "a\u2028b", **nulls}, ensure_ascii=False).encode() + b"\r\n")
    (prompt,) = read_prompts(path, "t2i", {"think": True})
    assert prompt.terms == (("text", "a\u2028b"),) and prompt.think is True and (prompt.name, prompt.task) == ("00000", "t2i")


def test_another_container_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps([{"prompt": "a"}] * 3, indent=1))
    with pytest.raises(ValueError, match="p.jsonl is one JSON list: one JSON object per line is expected"):
        read_prompts(tmp_path / "p.jsonl", "t2i", {})


@pytest.mark.parametrize("name", ["a\0.png", "b" * 5000, "c\ud83d.png", "gone.png"])
def test_image_names_that_no_file_has_are_named(name: str, tmp_path: Path) -> None:
    if "\ud83d" in name:
        with pytest.raises(ValueError, match="lone surrogate"):
            make_prompt("00000", "edit", ["x"], [name])
        return
    with pytest.raises(ValueError, match=r"00000: image .* does not exist") as caught:
        make_prompt("00000", "edit", ["x"], [str(tmp_path / name)]).check_files()
    assert len(str(caught.value)) < 400


def test_images_are_turned_unless_the_option_says_no(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "phone.jpg", exif=exif)
    prompt = make_prompt("00000", "edit", ["x"], [str(tmp_path / "phone.jpg")])
    assert [prompt.request(exif).terms[0].size for exif in ("turn", "ignore")] == [(4, 8), (8, 4)]
    assert read_image(tmp_path / "phone.jpg").size == (4, 8)
