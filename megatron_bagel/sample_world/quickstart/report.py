# SPDX-License-Identifier: Apache-2.0
"""``report.html``: everything a quickstart made, on one page without any other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_bagel.common.files import write_whole
from megatron_bagel.sample_world.exam import CHANCE, marks, read_lines
from megatron_bagel.sample_world.quickstart.folders import QuickstartFolders
from megatron_bagel.sample_world.world import World

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dde5 } .facts { color: #5b6b7a }
table { border-collapse: collapse } td, th { padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #e3e9ef }
td.number { text-align: right; font-variant-numeric: tabular-nums } .bar { display: inline-block; height: .7rem; background: #2f7ed8 }
.row { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0; max-width: 13.5rem; font-size: .85rem }
figure img { width: 96px; height: 96px; image-rendering: pixelated; border: 1px solid #d5dde5 } img.wide { max-width: 100% }
.right { color: #157a3c } .wrong { color: #b3261e } pre { background: #f3f6f9; padding: .8rem; overflow-x: auto }
"""
#: Marks that the page shows, in this order; an edit's "asked" and "kept" are parts of its "success".
_NAMES = {
    "t2i colour": "picture from words: colour", "t2i position": "picture from words: position", "t2i shape": "picture from words: shape",
    "t2i background": "picture from words: background", "question colour": "question: what color is it?",
    "question position": "question: where is it?", "question shape": "question: what shape is it?",
    "edit recolour success": "edit: new colour, the rest kept",
}  # fmt: skip
_SHOWN = 12


@dataclass(frozen=True)
class Mark:
    """Which questions of one kind were answered right, by "seen" and "held out" pairs, and what share guessing would give, if known."""

    title: str
    rights: Mapping[str, Sequence[bool]]
    chance: float | None

    @property
    def right(self) -> int:
        """Right answers."""
        return sum(sum(rights) for rights in self.rights.values())

    @property
    def asked(self) -> int:
        """Questions."""
        return sum(len(rights) for rights in self.rights.values())

    @property
    def cells(self) -> list[str]:
        """The columns of the table of marks: all, their number, seen pairs, new pairs, chance."""
        shares = [share(self.rights.get(pairs, ())) for pairs in ("seen", "held out")]
        return [f"{self.right / self.asked:.0%}", str(self.asked), *shares, f"{self.chance:.0%}" if self.chance else "–"]


#: Heads of ``Mark.cells``. A new pair is a colour and a shape that training never showed together.
_HEADS = ("right", "of", "seen", "new", "chance")


def share(rights: Sequence[bool]) -> str:
    """Return the share of right answers as text."""
    return f"{sum(rights) / len(rights):.0%}" if rights else "–"


def read_marks(folders: QuickstartFolders) -> list[Mark]:
    """Mark the exam's answers. Raises ValueError if one is missing."""
    table: dict[str, dict[str, list[bool]]] = {}
    for (name, pairs), rights in marks(folders.exam, folders.generated).items():
        table.setdefault(name, {})[pairs] = rights
    return [
        Mark(title, table[name], CHANCE.get(name.split()[-1]) if not name.startswith("edit") else None)
        for name, title in _NAMES.items()
        if name in table
    ]


def mark_lines(rows: Sequence[Mark]) -> list[str]:
    """Return the table of marks for a console."""
    lines = [(title, cells) for title, cells in [("", _HEADS), *((row.title, row.cells) for row in rows)]]
    return [f"{title:36s}" + "".join(cell.rjust(8) for cell in cells) for title, cells in lines]


def world_line(world: World) -> str:
    """Return a sentence about the world that the model learnt."""
    (width, height), *_ = world.picture_sizes
    pairs = ", ".join(" ".join(pair) for pair in sorted(world.held_out))
    return (
        f"The world: pictures of {width} x {height} pixels with one shape of {len(world.shapes)} kinds in {len(world.colours)} colours at "
        f"{len(world.positions)} places on {len(world.backgrounds)} backgrounds."
        + (f" Training never showed these pairs, which are half of the exam: {pairs}." if pairs else "")
    )


def write_report(folders: QuickstartFolders, facts: Sequence[str], rows: Sequence[Mark], next_steps: Sequence[tuple[str, str]]) -> None:
    """Write the page.

    Args:
        folders: What to show.
        facts: Sentences below the title: the world, minutes, machine.
        rows: The marks.
        next_steps: Pairs of a sentence and a command.
    """
    parts = [
        "<h1>A small BAGEL, trained from nothing</h1>",
        *(f'<p class="facts">{html.escape(fact)}</p>' for fact in facts),
        _section("What it can do", _marks_table(rows)),
        _section("Pictures from words", _pictures(folders, "t2i")),
        _section("Edits: before and after", _edits(folders)),
        _section("Answers", _answers(folders)),
        _section("The same prompts over the steps", "".join(_sheets(folders))),
        _section(
            "Curves",
            _wide(folders.questions / "results" / "loss.png", "First lesson: questions.")
            + _wide(folders.results / "loss.png", "Second lesson: pictures and edits."),
        ),
        _section("Where it lies", _places(folders)),
        _section("What to try next", "".join(f"<p>{html.escape(text)}</p><pre>{html.escape(line)}</pre>" for text, line in next_steps)),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>megatron_bagel quickstart</title><style>{_STYLE}</style>'
    write_whole(folders.report, f"{page}<body>{''.join(parts)}</body></html>\n")


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def _marks_table(rows: Iterable[Mark]) -> str:
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    lines = [f"<table><tr><th></th>{heads}<th></th></tr>"]
    for row in rows:
        bar = f'<span class="bar" style="width:{8 * row.right / row.asked:.2f}rem"></span>'
        numbers = "".join(f'<td class="number">{value}</td>' for value in row.cells)
        lines.append(f"<tr><td>{html.escape(row.title)}</td>{numbers}<td>{bar}</td></tr>")
    return "".join([*lines, "</table>"])


def _pictures(folders: QuickstartFolders, task: str) -> str:
    prompts = {row["id"]: row for row in read_lines(folders.exam / "prompts.jsonl")}
    answers = [row for row in read_lines(folders.generated / "results.jsonl") if row["task"] == task][:_SHOWN]
    return _row(_figure([folders.generated / row["image"]], prompts[row["id"]]["prompt"]) for row in answers)


def _edits(folders: QuickstartFolders) -> str:
    prompts = {row["id"]: row for row in read_lines(folders.exam / "prompts.jsonl")}
    answers = [row for row in read_lines(folders.generated / "results.jsonl") if row["task"] == "edit"][:_SHOWN]
    return _row(
        _figure([folders.exam / prompts[row["id"]]["image"], folders.generated / row["image"]], prompts[row["id"]]["prompt"])
        for row in answers
    )


def _answers(folders: QuickstartFolders) -> str:
    prompts = {row["id"]: row for row in read_lines(folders.exam / "prompts.jsonl")}
    truths = {row["id"]: row for row in read_lines(folders.exam / "truth.jsonl")}
    answers = [row for row in read_lines(folders.generated / "results.jsonl") if row["task"] == "understand"]
    # Some of each kind of question.
    chosen = [answers[index] for index in np.linspace(0, len(answers) - 1, min(_SHOWN, len(answers))).astype(int)] if answers else []
    return _row(_answer(folders, row, prompts[row["id"]], truths[row["id"]]["answer"]) for row in chosen)


def _answer(folders: QuickstartFolders, row: Mapping[str, str], prompt: Mapping[str, str], truth: str) -> str:
    answer = row["text"].strip()
    kind = "right" if answer == truth else "wrong"
    told = html.escape(answer) + ("" if kind == "right" else f" (it is: {html.escape(truth)})")
    return _figure([folders.exam / prompt["image"]], prompt["prompt"], f'<br><span class="{kind}">{told}</span>')


def _sheets(folders: QuickstartFolders) -> Iterable[str]:
    for sheet in sorted((folders.results / "samples").glob("*.png")):
        step, _, group = sheet.stem.partition("_")
        yield _wide(sheet, f"After {int(step)} steps, {group}")


def _row(figures: Iterable[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'


def _figure(pictures: Sequence[Path], caption: str, more: str = "") -> str:
    images = "".join(f'<img src="{_data(path)}" alt="{html.escape(caption)}"> ' for path in pictures)
    return f"<figure>{images}<figcaption>{html.escape(caption)}{more}</figcaption></figure>"


def _wide(path: Path, title: str) -> str:
    return f'<p>{html.escape(title)}</p><img class="wide" src="{_data(path)}" alt="{html.escape(title)}">' if path.is_file() else ""


def _places(folders: QuickstartFolders) -> str:
    places = {
        "model in BAGEL's released layout": folders.model, "checkpoints, to train on": folders.checkpoints,
        "pictures and answers of the exam": folders.generated, "its prompts and truths": folders.exam,
        "every loss of every logged step": folders.results / "metrics.jsonl", "what the commands printed": folders.logs,
    }  # fmt: skip
    rows = "".join(f"<tr><td>{html.escape(name)}</td><td><code>{html.escape(str(path))}</code></td></tr>" for name, path in places.items())
    return f"<table>{rows}</table>"


def _data(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
