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

from megatron_bagel.data.keyed_random import keyed_generator
from megatron_bagel.sample_world.exam import CHANCE, picture_grid, read_lines, read_picture, to_scene
from megatron_bagel.sample_world.text import captions, draw_edit
from megatron_bagel.sample_world.world import World, draw_scene, render, to_png

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
    print(f"{'':20s}{'right':>8s}{'of':>5s}{'chance':>9s}")
    for name, rights in table.items():
        print(f"{name:20s}{np.mean(rights):>8.0%}{len(rights):>5d}{CHANCE[name.split()[-1]]:>9.0%}")


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
            picture_grid(args.asked, args.answered).save(args.answered / "grid.png")
            print(f"all pictures: {args.answered / 'grid.png'}")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
