# SPDX-License-Identifier: Apache-2.0
"""An exam on the sample world: prompts whose truth is known, as files for generation, and marks for the answers.

Scenes come from another random stream than the training rows, so every picture is new to the model. With held-out pairs, half of the
scenes show a (colour, shape) pair that training never did. An edit counts if it changed what it should and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_bagel.common.json_files import json_lines
from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.sample_world.puzzles import draw_puzzle
from megatron_bagel.sample_world.score import Reading, read_single
from megatron_bagel.sample_world.text import captions, draw_edit, position_phrase
from megatron_bagel.sample_world.world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene, Shape, World, draw_scene, pick, render, to_png

#: Keys the scenes of exams; training data use smaller seeds.
SEED = 10_000
QUESTIONS: dict[str, tuple[str, Callable[[Scene], str]]] = {
    "colour": ("what color is it?", lambda scene: scene.shapes[0].colour),
    "position": ("where is it?", lambda scene: position_phrase(scene.shapes[0].position)),
    "shape": ("what shape is it?", lambda scene: scene.shapes[0].shape),
}
CHANCE = {"colour": 1 / len(COLOURS), "position": 1 / len(POSITIONS), "shape": 1 / len(SHAPES), "background": 1 / len(BACKGROUNDS)}


@dataclass(frozen=True)
class Exam:
    """The number of prompts of each kind: pictures from words, questions of each kind, edits of each kind in ``edit_kinds``, puzzles."""

    pictures: int = 48
    questions: int = 48
    edits: int = 48
    edit_kinds: tuple[str, ...] = ("recolour",)
    puzzles: int = 0


def exam_rows(world: World, exam: Exam) -> Iterable[tuple[dict[str, Any], dict[str, Any], np.ndarray | None]]:
    """Yield (prompt line, truth line, shown picture) of every question; ``world`` is the training world with its held-out pairs."""
    for number in range(exam.pictures):
        scene, pairs = exam_scene(world, "t2i", number)
        name = f"t2i_{number:03d}"
        yield {"id": name, "task": "t2i", "prompt": captions(scene, world)[0]}, _truth(name, "t2i", pairs, scene), None
    for attribute, (question, answer) in QUESTIONS.items():
        for number in range(exam.questions):
            scene, pairs = exam_scene(world, f"question {attribute}", number)
            name = f"question_{attribute}_{number:03d}"
            truth = {**_truth(name, f"question {attribute}", pairs, scene), "answer": answer(scene)}
            yield {"id": name, "task": "understand", "prompt": question, "image": f"{name}.png"}, truth, render(scene)
    for kind in exam.edit_kinds:
        for number in range(exam.edits):
            scene, pairs = exam_scene(world, f"edit {kind}", number)
            edit = draw_edit(scene, world, keyed_generator(SEED, "edit", kind, number, pairs), (kind,))
            name = f"edit_{kind}_{number:03d}"
            truth = {**_truth(name, f"edit {kind}", pairs, edit.after), "before": asdict(scene)}
            yield {"id": name, "task": "edit", "prompt": edit.instructions[0], "image": f"{name}.png"}, truth, render(scene)
    for number in range(exam.puzzles):
        scene, pairs = exam_scene(world, "interleaved", number)
        puzzle = draw_puzzle(scene, world, keyed_generator(SEED, "puzzle", number))
        name = f"interleaved_{number:03d}"
        prompt = {"id": name, "task": "interleave", "terms": [{"text": puzzle.question}], "output": ["text", "image"]}
        yield prompt, {**_truth(name, "interleaved", pairs, scene), "thought": puzzle.thought}, None


def exam_scene(world: World, kind: str, number: int) -> tuple[Scene, str]:
    """Return a scene, and whether training has "seen" its pair or it is "held out": every second one, if the world holds pairs out."""
    rng = keyed_generator(SEED, kind, number)
    scene = draw_scene(world, rng)
    if not world.held_out or number % 2 == 0:
        return scene, "seen"
    colour, shape = pick(rng, sorted(world.held_out))
    return replace(scene, shapes=(replace(scene.shapes[0], colour=colour, shape=shape), *scene.shapes[1:])), "held out"


def _truth(name: str, kind: str, pairs: str, scene: Scene) -> dict[str, Any]:
    return {"id": name, "kind": kind, "pairs": pairs, "scene": asdict(scene)}


def write_exam(world: World, exam: Exam, out: Path) -> None:
    """Write ``prompts.jsonl`` for ``megatron_bagel.generate --input``, its pictures, and ``truth.jsonl`` for ``marks``."""
    out.mkdir(parents=True, exist_ok=True)
    prompts, truths = [], []
    for prompt, truth, picture in exam_rows(world, exam):
        prompts.append(json.dumps(prompt) + "\n")
        truths.append(json.dumps(truth) + "\n")
        if picture is not None:
            (out / prompt["image"]).write_bytes(to_png(picture))
    (out / "prompts.jsonl").write_text("".join(prompts))
    (out / "truth.jsonl").write_text("".join(truths))


def marks(exam_folder: Path, answer_folder: Path, colours: tuple[str, ...] = tuple(COLOURS)) -> dict[tuple[str, str], list[bool]]:
    """Return right or wrong by (name, "seen" or "held out"): "t2i colour", "question position", "edit recolour success", ...

    Pictures are read as showing one of ``colours``.
    """
    results = {row["id"]: row for row in read_lines(answer_folder / "results.jsonl")}
    table: dict[tuple[str, str], list[bool]] = {}
    for truth in read_lines(exam_folder / "truth.jsonl"):
        if truth["id"] not in results:
            raise ValueError(f"{answer_folder / 'results.jsonl'} has no answer to {truth['id']}; generate the others with --resume")
        result = results[truth["id"]]
        if "thought" in truth:
            results_by_name = puzzle_marks(truth, result["items"], answer_folder)
        elif "answer" in truth:
            results_by_name = {truth["kind"]: result["text"].strip() == truth["answer"]}
        else:
            results_by_name = picture_marks(truth, read_picture(answer_folder / result["image"], colours))
        for name, right in results_by_name.items():
            table.setdefault((name, truth["pairs"]), []).append(right)
    return table


def picture_marks(truth: Mapping[str, Any], reading: Reading) -> dict[str, bool]:
    """Mark one picture: each attribute for a picture from words; asked, kept and success for an edit."""
    expected = attributes(to_scene(truth["scene"]))
    actual = {"background": reading.background}
    if reading.shape is not None:
        actual |= {"colour": reading.shape.colour, "position": reading.shape.position, "shape": reading.shape.shape}
    correct = {name: actual.get(name) == value for name, value in expected.items()}
    if "before" not in truth:
        return {f"{truth['kind']} {name}": value for name, value in correct.items()}
    attributes_before = attributes(to_scene(truth["before"]))
    changed_names = [name for name in expected if expected[name] != attributes_before[name]]
    is_done, is_kept = (
        all(correct[name] for name in changed_names),
        all(value for name, value in correct.items() if name not in changed_names),
    )
    return {f"{truth['kind']} asked": is_done, f"{truth['kind']} kept": is_kept, f"{truth['kind']} success": is_done and is_kept}


def puzzle_marks(truth: Mapping[str, Any], items: Sequence[Mapping[str, Any]], answer_folder: Path) -> dict[str, bool]:
    """Mark a thought, word for word, each attribute of the picture after it, and the picture as a whole."""
    thought, picture = items
    drawn = picture_marks(truth, read_picture(answer_folder / picture["image"]))
    is_right = {f"{truth['kind']} thought": thought["text"].strip() == truth["thought"], **drawn}
    return {**is_right, f"{truth['kind']} all": all(is_right.values())}


def attributes(scene: Scene) -> dict[str, str]:
    """Return the attributes that are read from a picture of one shape."""
    shape = scene.shapes[0]
    return {"colour": shape.colour, "position": shape.position, "shape": shape.shape, "background": scene.background}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file. Raises ValueError if it does not exist."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; run the step before this one first")
    return [row for _, row in json_lines(path, "exam")]


def to_scene(row: Mapping[str, Any]) -> Scene:
    """Build a scene from its JSON form."""
    return Scene(row["background"], tuple(Shape(**shape) for shape in row["shapes"]), row["width"], row["height"])


def read_picture(path: Path, colours: tuple[str, ...] = tuple(COLOURS)) -> Reading:
    """Read a PNG of one shape of one of ``colours``."""
    return read_single(np.asarray(Image.open(path).convert("RGB")), colours=colours)


def picture_grid(exam_folder: Path, answer_folder: Path, columns: int = 8, ids: Sequence[str] | None = None) -> Image.Image:
    """Arrange drawn pictures in a grid at twice their size, edits as pairs of before and after. Raises ValueError if there are none."""
    pictures = []
    for row in read_lines(answer_folder / "results.jsonl"):
        if ids is not None and row["id"] not in ids:
            continue
        if "image" in row and row["task"] == "edit":
            pictures.append(Image.open(exam_folder / f"{row['id']}.png").convert("RGB"))
        drawn = [item["image"] for item in row.get("items", [row]) if "image" in item]
        pictures += [Image.open(answer_folder / name).convert("RGB") for name in drawn]
    if not pictures:
        raise ValueError(f"{answer_folder / 'results.jsonl'} holds no picture")
    width, height = pictures[0].size
    step_x, step_y = 2 * width + 8, 2 * height + 8
    grid = Image.new("RGB", (columns * step_x, -(-len(pictures) // columns) * step_y), (200, 200, 200))
    for i, picture in enumerate(pictures):
        corner = (i % columns * step_x + 4, i // columns * step_y + 4)
        grid.paste(picture.resize((2 * width, 2 * height), Image.Resampling.NEAREST), corner)
    return grid
