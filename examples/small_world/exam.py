# SPDX-License-Identifier: Apache-2.0
"""Writes the exam of the small world, marks the answers of every checkpoint, and draws the marks over the steps.

python examples/small_world/exam.py ask WORLD_JSON OUT          writes OUT/prompts.jsonl, OUT/truth.jsonl and the pictures shown
python examples/small_world/exam.py marks ASKED ANSWERS         reads ANSWERS/<step>/results.jsonl, prints the last step's table, and
                                                               writes marks.jsonl, marks.png and grid.png into ANSWERS;
                                                               --puzzles RUN adds the last marks of an output folder of interleaved.sh
python examples/small_world/exam.py compare RUN RUN ...         a table of the last marks of several output folders of run.sh
"""

import argparse
import json
from pathlib import Path

import numpy as np

from megatron_bagel.sample_world.exam import CHANCE, Exam, marks, picture_grid, read_lines, write_exam
from megatron_bagel.sample_world.text import EDITS
from megatron_bagel.sample_world.world import read_world

PAIRS = ("seen", "held out")


def steps_of(answers: Path) -> list[Path]:
    """Folders of answers, by step. ValueError when there is none."""
    folders = sorted((path for path in answers.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    if not folders:
        raise ValueError(f"{answers} has no folder of answers; megatron_bagel.generate writes one for each checkpoint")
    return folders


def print_table(table: dict[tuple[str, str], list[bool]]) -> None:
    """One line per kind of mark, beside what guessing would give."""
    names = list(dict.fromkeys(name for name, _ in table))
    print(f"{'':24s}{'seen pairs':>16s}{'held-out pairs':>18s}{'chance':>9s}")
    for name in names:
        shown = []
        for pairs, width in zip(PAIRS, (16, 18), strict=True):
            rights = table.get((name, pairs), [])
            shown.append(f"{np.mean(rights):.1%} of {len(rights)}".rjust(width) if rights else "-".rjust(width))
        chance = CHANCE.get(name.split()[-1])
        print(f"{name:24s}{''.join(shown)}{f'{chance:.0%}' if chance and not name.startswith('edit') else '-':>9s}")


def draw_curves(rows: list[dict], path: Path) -> None:
    """Marks over steps, seen pairs solid and held-out pairs dashed, one panel per kind of prompt."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for row in rows for name in row["marks"]))
    kinds = list(dict.fromkeys(name.split()[0] for name in names))
    figure = Figure(figsize=(5 * len(kinds), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, kind in zip(np.atleast_1d(figure.subplots(1, len(kinds))), kinds, strict=True):
        for number, name in enumerate(name for name in names if name.split()[0] == kind):
            for pairs, style in zip(PAIRS, ("-", "--"), strict=True):
                points = [(row["step"], row["marks"][name][pairs]) for row in rows if pairs in row["marks"].get(name, {})]
                if points:
                    label = name.removeprefix(kind + " ") if pairs == "seen" else None
                    axes.plot(*zip(*points, strict=True), style, color=f"C{number}", marker=".", label=label)
        axes.set(title=kind, xlabel="step", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def mark(asked: Path, answers: Path, autoencoder: Path | None, puzzles: Path | None) -> None:
    """Marks of every step on disk, the last one's table on the console, with the last marks of the puzzles' own model below."""
    rows = []
    for folder in steps_of(answers):
        table = marks(asked, folder)
        shares: dict[str, dict[str, float]] = {}
        for (name, pairs), rights in table.items():
            shares.setdefault(name, {})[pairs] = float(np.mean(rights))
        rows.append({"step": int(folder.name), "marks": shares})
    (answers / "marks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(rows, answers / "marks.png")
    if any("image" in item for row in read_lines(steps_of(answers)[-1] / "results.jsonl") for item in row.get("items", [row])):
        picture_grid(asked, steps_of(answers)[-1]).save(answers / "grid.png")
    print(f"after {rows[-1]['step']} steps" + (f"; puzzles: after {int(steps_of(puzzles / 'answers')[-1].name)}" if puzzles else ""))
    print_table({**table, **(marks(puzzles / "exam", steps_of(puzzles / "answers")[-1]) if puzzles else {})})
    if autoencoder is not None:
        # What the autoencoder alone loses is lost to every picture above.
        from train_autoencoder import judge, load_autoencoder, told

        print(f"autoencoder alone: {told(judge(load_autoencoder(autoencoder)))}")
    print(f"curves {answers / 'marks.png'}, pictures {answers / 'grid.png'}, numbers {answers / 'marks.jsonl'}")


def compare(runs: list[Path]) -> None:
    """One column per run: its last marks, over seen and held-out pairs together."""
    last = [read_lines(run / "answers/marks.jsonl")[-1] for run in runs]
    width = max(14, *(len(run.name) + 2 for run in runs))
    print(f"{'':24s}" + "".join(run.name.rjust(width) for run in runs))
    print(f"{'steps':24s}" + "".join(str(row["step"]).rjust(width) for row in last))
    for name in dict.fromkeys(name for row in last for name in row["marks"]):
        shares = [row["marks"].get(name, {}).values() for row in last]
        print(f"{name:24s}" + "".join((f"{np.mean(list(share)):.1%}" if share else "-").rjust(width) for share in shares))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("ask", help="write prompts and the pictures they show")
    asking.add_argument("world", type=Path, help="world.json of the data trained on")
    asking.add_argument("out", type=Path)
    for name, what in (("pictures", "pictures from words"), ("questions", "questions of each kind"), ("edits", "edits of each kind"),
                       ("puzzles", "puzzles: a question, a thought and a picture in one sample")):  # fmt: skip
        asking.add_argument(f"--{name}", type=int, default=getattr(Exam, name), metavar="N", help=f"{what} (default %(default)s)")
    asking.add_argument("--edit-kinds", nargs="+", default=["recolour"], choices=list(EDITS), help="default recolour")
    marking = commands.add_parser("marks", help="mark the answers")
    marking.add_argument("asked", type=Path, help="the folder that `ask` wrote")
    marking.add_argument("answers", type=Path, help="a folder with a folder of answers for each step")
    marking.add_argument("--puzzles", type=Path, metavar="RUN", help="output folder of interleaved.sh, whose last marks join the table")
    marking.add_argument("--autoencoder", type=Path, help="ae.safetensors, to measure what it loses by itself")
    comparing = commands.add_parser("compare", help="marks of several runs beside each other")
    comparing.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="output folders of run.sh")
    args = parser.parse_args(argv)
    try:
        if args.command == "ask":
            write_exam(
                read_world(args.world), Exam(args.pictures, args.questions, args.edits, tuple(args.edit_kinds), args.puzzles), args.out
            )
        elif args.command == "compare":
            compare(args.runs)
        else:
            mark(args.asked, args.answers, args.autoencoder, args.puzzles)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
