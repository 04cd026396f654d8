"""Asks the quickstart's model for pictures, answers and edits whose truth is known, and scores what came back.

    python examples/quickstart/questions.py make OUT           writes OUT/prompts.jsonl and the pictures it shows the model
    python examples/quickstart/questions.py score OUT ANSWERS  reads ANSWERS/results.jsonl, prints a table against chance, and puts
                                                              all pictures into ANSWERS/grid.png
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.data.sample_world import COLOURS, POSITIONS, SHAPES, Scene, Shape, World, draw_scene, render, to_png
from megatron_bagel.data.sample_world_score import Reading, read_single
from megatron_bagel.data.sample_world_text import captions, draw_edit

WORLD = World()
# Another stream than any training row: these scenes are new to the model as pictures.
SEED = 10_000
QUESTIONS = {"what color is it?": "colour", "what shape is it?": "shape"}


def make(out: Path, pictures: int, answers: int, edits: int) -> None:
    """Writes prompts.jsonl for `megatron_bagel.generate --input`, the pictures, and truth.jsonl for `score`."""
    out.mkdir(parents=True, exist_ok=True)
    prompts, truths = [], []
    for i in range(pictures):
        scene = draw_scene(WORLD, keyed_generator(SEED, "t2i", i))
        prompts.append({"id": f"t2i_{i:02d}", "task": "t2i", "prompt": captions(scene, WORLD)[0]})
        truths.append({"id": f"t2i_{i:02d}", "scene": asdict(scene)})
    for i in range(answers):
        scene = draw_scene(WORLD, keyed_generator(SEED, "understand", i))
        (out / f"understand_{i:02d}.png").write_bytes(to_png(render(scene)))
        question = list(QUESTIONS)[i % len(QUESTIONS)]
        prompts.append({"id": f"understand_{i:02d}", "task": "understand", "prompt": question, "image": f"understand_{i:02d}.png"})
        truths.append({"id": f"understand_{i:02d}", "scene": asdict(scene), "question": question})
    for i in range(edits):
        rng = keyed_generator(SEED, "edit", i)
        scene = draw_scene(WORLD, rng)
        edit = draw_edit(scene, WORLD, rng, ("recolour",))
        (out / f"edit_{i:02d}.png").write_bytes(to_png(render(scene)))
        prompts.append({"id": f"edit_{i:02d}", "task": "edit", "prompt": edit.instructions[0], "image": f"edit_{i:02d}.png"})
        truths.append({"id": f"edit_{i:02d}", "scene": asdict(edit.after)})
    for name, rows in (("prompts", prompts), ("truth", truths)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL file; ValueError where it is missing."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; run the step before this one first")
    return [json.loads(line) for line in path.read_text().splitlines()]


def to_scene(row: dict) -> Scene:
    """A scene from its JSON form."""
    return Scene(row["background"], tuple(Shape(**shape) for shape in row["shapes"]), row["width"], row["height"])


def read_picture(path: Path) -> Reading:
    """What a PNG shows."""
    return read_single(np.asarray(Image.open(path).convert("RGB")))


def score(asked: Path, answered: Path) -> dict[str, list[bool]]:
    """Right or wrong per attribute: "t2i colour", "question shape", "edit position", ..."""
    results = {row["id"]: row for row in read_lines(answered / "results.jsonl")}
    table: dict[str, list[bool]] = {}
    for truth in read_lines(asked / "truth.jsonl"):
        wanted, result = to_scene(truth["scene"]).shapes[0], results[truth["id"]]
        if "question" in truth:
            attribute = QUESTIONS[truth["question"]]
            table.setdefault(f"question {attribute}", []).append(result["text"].strip() == getattr(wanted, attribute))
            continue
        found = read_picture(answered / result["image"]).shape
        for attribute in ("colour", "position", "shape"):
            right = found is not None and getattr(found, attribute) == getattr(wanted, attribute)
            table.setdefault(f"{truth['id'].split('_')[0]} {attribute}", []).append(right)
    return table


def print_table(table: dict[str, list[bool]]) -> None:
    """One line per attribute, beside what guessing would give."""
    chance = {"colour": 1 / len(COLOURS), "position": 1 / len(POSITIONS), "shape": 1 / len(SHAPES)}
    print(f"{'':20s}{'right':>8s}{'of':>5s}{'chance':>9s}")
    for name, rights in table.items():
        print(f"{name:20s}{np.mean(rights):>8.0%}{len(rights):>5d}{chance[name.split()[-1]]:>9.0%}")


def draw_grid(asked: Path, answered: Path, columns: int = 8) -> Path:
    """All drawn pictures side by side, twice their size; edits as pairs of before and after. Returns the file's path."""
    pictures = []
    for row in read_lines(answered / "results.jsonl"):
        if "image" in row:
            if row["task"] == "edit":
                pictures.append(Image.open(asked / f"{row['id']}.png").convert("RGB"))
            pictures.append(Image.open(answered / row["image"]).convert("RGB"))
    if not pictures:
        raise ValueError(f"{answered / 'results.jsonl'} holds no picture")
    width, height = pictures[0].size
    step_x, step_y = 2 * width + 8, 2 * height + 8
    grid = Image.new("RGB", (columns * step_x, -(-len(pictures) // columns) * step_y), (200, 200, 200))
    for i, picture in enumerate(pictures):
        grid.paste(picture.resize((2 * width, 2 * height), Image.Resampling.NEAREST), (i % columns * step_x + 4, i // columns * step_y + 4))
    grid.save(answered / "grid.png")
    return answered / "grid.png"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write prompts and the pictures they show")
    making.add_argument("out", type=Path)
    for name, count in (("pictures", 24), ("answers", 16), ("edits", 8)):
        making.add_argument(f"--{name}", type=int, default=count, help=f"default {count}")
    scoring = commands.add_parser("score", help="score the answers")
    scoring.add_argument("asked", type=Path, help="the folder that `make` wrote")
    scoring.add_argument("answered", type=Path, help="the folder that megatron_bagel.generate wrote")
    args = parser.parse_args(argv)
    try:
        if args.command == "make":
            make(args.out, args.pictures, args.answers, args.edits)
        else:
            print_table(score(args.asked, args.answered))
            print(f"all pictures: {draw_grid(args.asked, args.answered)}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
