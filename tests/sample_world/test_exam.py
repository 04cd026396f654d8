# SPDX-License-Identifier: Apache-2.0
"""The exam's truth is the truth: who answers with it gets full marks, who changes anything else loses the mark for keeping."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.inference.batch.prompts import read_prompts
from megatron_bagel.sample_world.exam import Exam, marks, picture_grid, picture_marks, read_lines, to_scene, write_exam
from megatron_bagel.sample_world.puzzles import draw_puzzle
from megatron_bagel.sample_world.score import read_single
from megatron_bagel.sample_world.text import captions
from megatron_bagel.sample_world.world import World, draw_scene, parse_pairs, render

WORLD = World(held_out=parse_pairs(["red:square", "green:circle"]))
EXAM = Exam(pictures=8, questions=4, edits=6, edit_kinds=("recolour", "move"), puzzles=8)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exam")
    write_exam(WORLD, EXAM, folder)
    return folder


def answer(asked: Path, answered: Path, perfect: bool) -> None:
    answered.mkdir()
    rows = []
    for prompt, truth in zip(read_lines(asked / "prompts.jsonl"), read_lines(asked / "truth.jsonl"), strict=True):
        row = {"id": truth["id"], "task": prompt["task"]}
        if "thought" in truth:
            row["items"] = [{"text": truth["thought"] if perfect else "a"}, {"image": f"{truth['id']}-1.png"}]
            pixels = render(to_scene(truth["scene"])) if perfect else np.full((64, 64, 3), 90, np.uint8)
            Image.fromarray(pixels).save(answered / f"{truth['id']}-1.png")
        elif "answer" in truth:
            row["text"] = truth["answer"] if perfect else "yes"
        else:
            row["image"] = f"{truth['id']}.png"
            pixels = render(to_scene(truth["scene"])) if perfect else np.full((64, 64, 3), 90, np.uint8)
            Image.fromarray(pixels).save(answered / row["image"])
        rows.append(json.dumps(row) + "\n")
    (answered / "results.jsonl").write_text("".join(rows))


def test_prompts_are_those_generation_reads(asked: Path) -> None:
    prompts = read_prompts(asked / "prompts.jsonl", "t2i", {})
    assert len(prompts) == 8 + 3 * 4 + 2 * 6 + 8
    assert prompts[-1].outputs == ("text", "image")
    for prompt in prompts:
        prompt.check_files()


@pytest.mark.parametrize("perfect", [True, False])
def test_marks(asked: Path, tmp_path: Path, perfect: bool) -> None:
    answer(asked, tmp_path / "a", perfect)
    table = marks(asked, tmp_path / "a")
    assert {pairs for _, pairs in table} == {"seen", "held out"}
    assert all(all(rights) == perfect for (name, _), rights in table.items() if "background" not in name)
    assert picture_grid(asked, tmp_path / "a").width > 64


def test_held_out_pairs_are_shown_where_they_should(asked: Path) -> None:
    for truth in read_lines(asked / "truth.jsonl"):
        shape = to_scene(truth.get("before", truth["scene"])).shapes[0]
        assert ((shape.colour, shape.shape) in WORLD.held_out) == (truth["pairs"] == "held out")


def test_an_edit_that_changes_more_than_asked_did_not_keep(asked: Path) -> None:
    truth = next(row for row in read_lines(asked / "truth.jsonl") if row["kind"] == "edit recolour")
    scene = to_scene(truth["scene"])
    elsewhere = "center" if scene.shapes[0].position != "center" else "left"
    moved = replace(scene, shapes=(replace(scene.shapes[0], position=elsewhere),))
    found = picture_marks(truth, read_single(render(moved)))
    assert found == {"edit recolour asked": True, "edit recolour kept": False, "edit recolour success": False}
    untouched = picture_marks(truth, read_single(render(to_scene(truth["before"]))))
    assert untouched == {"edit recolour asked": False, "edit recolour kept": True, "edit recolour success": False}


def test_a_missing_answer_is_named(asked: Path, tmp_path: Path) -> None:
    answer(asked, tmp_path / "a", True)
    lines = (tmp_path / "a/results.jsonl").read_text().splitlines()
    (tmp_path / "a/results.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="no answer to interleaved_007"):
        marks(asked, tmp_path / "a")


def test_scenes_survive_json(asked: Path) -> None:
    for truth in read_lines(asked / "truth.jsonl"):
        assert json.loads(json.dumps(asdict(to_scene(truth["scene"])))) == truth["scene"]


def test_puzzles_say_what_changes_and_draw_what_they_say(asked: Path) -> None:
    """The question names every attribute of the scene before and the new word; training shows no held-out pair, not even in words."""
    for number in range(60):
        rng = keyed_generator(0, "puzzle", number)
        scene = draw_scene(WORLD, rng)
        puzzle = draw_puzzle(scene, WORLD, rng)
        before, change = puzzle.question.split(": ")
        assert puzzle.thought == captions(scene, WORLD)[0] and puzzle.scene == scene and before != puzzle.thought
        assert not {tuple(before.split()[1:3])} & WORLD.held_out
        new = set(puzzle.thought.split()) - set(before.split())
        assert new <= set(change.split())
