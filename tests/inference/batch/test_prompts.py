"""JSONL in: every kind of bad line is refused with its file and number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

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
