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
from megatron_bagel.sample_world.quickstart.report import mark_lines, read_marks, write_report
from megatron_bagel.sample_world.world import World, render


def answer_exam(folders: QuickstartFolders, perfect: bool) -> None:
    """Write results and pictures as the generator does."""
    write_exam(World(), Exam(pictures=6, questions=4, edits=3), folders.exam)
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
    assert "100%" in mark_lines(rows)[1] if perfect else "0%" in mark_lines(rows)[1]


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
    Image.new("RGB", (4, 4)).save(folders.results / "loss.png")
    write_report(folders, ["3 minutes & more."], read_marks(folders), [("Draw <one>.", "megatron-bagel generate --model x")])
    text = folders.report.read_text()
    page = _Sources()
    page.feed(text)
    assert not page.open
    # 6 pictures, 3 edits of two pictures, 12 answers, a sheet, a curve.
    assert len(page.sources) == 6 + 6 + 12 + 1 + 1
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "After 500 steps, t2i_pretrain" in text and "3 minutes &amp; more." in text
    assert "no &lt;idea&gt;" in text and "(it is: " in text and "Draw &lt;one&gt;." in text
    assert not re.search(r"https?://", text)
