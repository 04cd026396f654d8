# SPDX-License-Identifier: Apache-2.0
"""The page at the end shows what a model did, needs no other file, and its marks tell a perfect model from a blind one."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.sample_world.exam import Exam, read_lines, to_scene, write_exam
from megatron_bagel.sample_world.quickstart.folders import QuickstartFolders
from megatron_bagel.sample_world.quickstart.report import Mark, mark_lines, read_marks, world_line, write_report
from megatron_bagel.sample_world.world import World, parse_pairs, render

WORLD = World(held_out=parse_pairs(["red:square", "green:circle"]))


def answer_exam(folders: QuickstartFolders, perfect: bool) -> None:
    """Write results and pictures as the generator does."""
    write_exam(WORLD, Exam(pictures=6, questions=4, edits=3), folders.exam)
    folders.generated.mkdir(parents=True)
    rows = []
    prompts, truths = (read_lines(folders.exam / f"{name}.jsonl") for name in ("prompts", "truth"))
    for prompt, truth in zip(prompts, truths, strict=True):
        row = {"id": truth["id"], "task": prompt["task"]}
        if "answer" in truth:
            row["text"] = truth["answer"] if perfect else "no <idea>"
        else:
            row["image"] = f"{truth['id']}.png"
            pixels = render(to_scene(truth["scene"])) if perfect else np.full((64, 64, 3), 90, np.uint8)
            Image.fromarray(pixels).save(folders.generated / row["image"])
        rows.append(json.dumps(row) + "\n")
    (folders.generated / "results.jsonl").write_text("".join(rows))


@pytest.mark.parametrize("perfect", [True, False])
def test_marks(tmp_path: Path, perfect: bool) -> None:
    folders = QuickstartFolders(tmp_path)
    answer_exam(folders, perfect)
    rows = read_marks(folders)
    assert [row.asked for row in rows] == [6, 6, 6, 6, 4, 4, 4, 3]
    assert all(row.right == (row.asked if perfect else 0) for row in rows if "background" not in row.title)
    heads, colour = (line.split() for line in mark_lines(rows)[:2])
    assert heads == ["right", "of", "seen", "new", "chance"]
    assert colour[-5:] == [*(["100%", "6", "100%", "100%"] if perfect else ["0%", "6", "0%", "0%"]), "12%"]
    lopsided = Mark("a", {"seen": [True, True], "held out": [False, True]}, None)
    assert lopsided.cells == ["75%", "4", "100%", "50%", "–"] and Mark("b", {"seen": [True]}, 0.25).cells[3:] == ["–", "25%"]


def test_the_world_is_told() -> None:
    assert "64 x 64 pixels with one shape of 4 kinds in 8 colours at 9 places on 3 backgrounds" in world_line(WORLD)
    assert "green circle, red square" in world_line(WORLD) and "never" not in world_line(World())


class _Sources(HTMLParser):
    """Collects what a page loads, and checks that its tags are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        values = dict(attrs)
        self.sources += [values[name] for name in ("src", "href") if name in values]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_by_itself(tmp_path: Path) -> None:
    folders = QuickstartFolders(tmp_path)
    answer_exam(folders, perfect=False)
    sheets = folders.results / "samples"
    sheets.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(sheets / "0000500_t2i_pretrain.png")
    for lesson in (folders.results, folders.questions / "results"):
        lesson.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(lesson / "loss.png")
    write_report(folders, ["3 minutes & more."], read_marks(folders), [("Draw <one>.", "megatron-bagel generate --model x")])
    text = folders.report.read_text()
    page = _Sources()
    page.feed(text)
    assert not page.open
    # 6 pictures, 3 edits of two pictures, 12 answers, a sheet, a curve of each lesson.
    assert len(page.sources) == 6 + 6 + 12 + 1 + 2
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "After 500 steps, t2i_pretrain" in text and str(folders.model) in text and "3 minutes &amp; more." in text
    assert "no &lt;idea&gt;" in text and "(it is: " in text and "Draw &lt;one&gt;." in text
    assert not re.search(r"https?://", text)
