# SPDX-License-Identifier: Apache-2.0
"""The lesson of a new colour has half of its pictures in it, and its table sets the marks side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.new_colour import Lesson, table_of
from megatron_bagel.sample_world.folders import FolderSpec
from megatron_bagel.sample_world.world import COLOURS, World


def test_the_halves_of_an_exam_are_the_new_colour_and_the_world_of_the_base(tmp_path: Path) -> None:
    spec = asdict(FolderSpec(World(held_out=frozenset({("red", "square")}))))
    spec["world"]["held_out"] = sorted(spec["world"]["held_out"])
    (tmp_path / "data").mkdir()
    (tmp_path / "data/world.json").write_text(json.dumps(spec))
    lesson = Lesson(tmp_path, tmp_path / "work", "brown", tmp_path / "model")
    assert lesson.half("known").colours == tuple(COLOURS) and ("red", "square") not in lesson.half("known").pairs()
    assert {colour for colour, _ in lesson.half("new").pairs()} == {"brown"} and not lesson.half("new").held_out


def test_the_table_has_a_line_for_each_mark() -> None:
    before, after = ({half: {"t2i colour": share} for half in ("new", "known")} for share in (0.125, 0.75))
    assert table_of(before, after).splitlines()[1].split() == ["t2i", "colour", "12%", "75%", "12%", "75%"]
