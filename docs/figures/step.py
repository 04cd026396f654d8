# SPDX-License-Identifier: Apache-2.0
"""Draws one training step over time: ``python docs/figures/step.py`` writes ``docs/images/step.svg``.

The layout is two pipeline stages by two replicas, with four microbatches per replica. Block widths are illustrative, except that a backward
pass takes twice as long as a forward pass. The pipeline blocks come from a simulation of the 1F1B schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

OUTPUT = Path(__file__).resolve().parent.parent / "images" / "step.svg"
STAGES, REPLICAS, MICROBATCHES = 2, 2, 4
FORWARD_TIME, BACKWARD_TIME = 1, 2

WIDTH, HEIGHT = 1440, 456
ROW_HEIGHT, BLOCK_HEIGHT, UNIT = 52, 38, 29
TOP, REPLICA_GAP, LEFT = 88, 22, 160
#: Left edge of each column; the last entry is the right edge of the figure.
COLUMNS = (170, 242, 318, 394, 534, 989, 1149, 1262, 1420)
TITLES = ("1 Plan", "2 Layout", "3 Count", "4 Encode", "5 Pipeline", "6 Encode backward", "7 Judge", "8 Update")
#: Text under the columns: left edge and lines.
NOTES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (COLUMNS[0], ("Every rank plans alike.", "Workers lay out and", "read packs ahead.")),
    (COLUMNS[2], ("Replicas", "sum their", "counts.")),
    (COLUMNS[3], ("Each rank encodes a", "share of the images.", "Stages get the rows", "they read.")),
    (COLUMNS[4], ("1F1B: a stage runs its layers on one pack after another.", "Losses are divided by the counts of step 3.")),
    (COLUMNS[5], ("Gradients of features", "return to the ranks", "that encoded them.")),
    (COLUMNS[6], ("Gradients are", "summed, then", "norm and losses.")),
    (COLUMNS[7], ("Each rank updates its", "shard; weights are", "gathered. A bad step", "skips this.")),
)
INTEGER, ENCODER, FORWARD, BACKWARD, UPDATE, EXCHANGE = "#e2e8f0", "#fde68a", "#bfdbfe", "#3b82f6", "#bbf7d0", "#7c3aed"
INK, MUTED, GRID = "#1f2937", "#64748b", "#e5e7eb"


@dataclass(frozen=True)
class Pass:
    """A forward or backward pass of one microbatch on one stage, in units of time."""

    stage: int
    microbatch: int
    backward: bool
    start: int
    end: int


def order_of(stage: int) -> list[tuple[int, bool]]:
    """Return the passes of a stage as (microbatch, backward), in the order of 1F1B."""
    warmup = min(STAGES - 1 - stage, MICROBATCHES)
    order = [(microbatch, False) for microbatch in range(warmup)]
    for microbatch in range(warmup, MICROBATCHES):
        order += [(microbatch, False), (microbatch - warmup, True)]
    return order + [(microbatch, True) for microbatch in range(MICROBATCHES - warmup, MICROBATCHES)]


def schedule() -> list[Pass]:
    """Return every pass at the earliest time that its stage and the pass before it allow."""
    waiting = {stage: order_of(stage) for stage in range(STAGES)}
    free = dict.fromkeys(waiting, 0)
    ends: dict[tuple[int, int, bool], int] = {}
    passes = []
    while any(waiting.values()):
        for stage, order in waiting.items():
            while order:
                microbatch, backward = order[0]
                neighbour = stage + 1 if backward else stage - 1
                needed = (neighbour, microbatch, backward) if 0 <= neighbour < STAGES else None
                if needed is not None and needed not in ends:
                    break
                start = max(free[stage], ends[needed] if needed is not None else 0)
                free[stage] = start + (BACKWARD_TIME if backward else FORWARD_TIME)
                ends[stage, microbatch, backward] = free[stage]
                passes.append(Pass(stage, microbatch, backward, start, free[stage]))
                order.pop(0)
    return passes


def text(x: float, y: float, content: str, size: int = 13, colour: str = INK, anchor: str = "start", bold: bool = False) -> str:
    """Return a line of text whose baseline is at ``y``."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(content)}</text>'


def block(x: float, y: float, width: float, fill: str, label: str = "", colour: str = INK) -> list[str]:
    """Return a rounded block of a row, with its label in the middle."""
    shape = f'<rect x="{x + 1:g}" y="{y:g}" width="{width - 2:g}" height="{BLOCK_HEIGHT}" rx="4" fill="{fill}"/>'
    return [shape, text(x + width / 2, y + BLOCK_HEIGHT / 2 + 5, label, colour=colour, anchor="middle")] if label else [shape]


def exchange(x: float, rows: Sequence[tuple[int, int]]) -> list[str]:
    """Return a bar over the ranks of ``rows`` that communicate, with a dot on each."""
    tops = [row_top(*row) for row in rows]
    bar = f'<rect x="{x - 2:g}" y="{tops[0]:g}" width="4" height="{tops[-1] + BLOCK_HEIGHT - tops[0]:g}" rx="2" fill="{EXCHANGE}"/>'
    dots = [f'<circle cx="{x:g}" cy="{top + BLOCK_HEIGHT / 2:g}" r="6" fill="{EXCHANGE}"/>' for top in tops]
    return [bar, *dots]


def row_top(replica: int, stage: int) -> int:
    """Return the upper edge of a rank's blocks."""
    return TOP + (replica * STAGES + stage) * ROW_HEIGHT + replica * REPLICA_GAP


def frame() -> list[str]:
    """Return the background, the titles and edges of the columns, and the notes below."""
    bottom = row_top(REPLICAS - 1, STAGES - 1) + BLOCK_HEIGHT + 14
    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(20, 32, "One training step, two stages by two replicas", 17, bold=True),
    ]
    parts.append(text(WIDTH - 18, 32, "time →", colour=MUTED, anchor="end"))
    for left, title in zip(COLUMNS, TITLES, strict=False):
        parts.append(f'<line x1="{left - 6}" y1="54" x2="{left - 6}" y2="{bottom}" stroke="{GRID}"/>')
        parts.append(text(left, 68, title, bold=True))
    for left, lines in NOTES:
        parts += [text(left, bottom + 20 + 17 * number, line, 12, MUTED) for number, line in enumerate(lines)]
    return parts


def rank_row(replica: int, stage: int) -> list[str]:
    """Return the label and the blocks of one rank."""
    y = row_top(replica, stage)
    # Megatron-Core numbers data-parallel ranks before pipeline stages.
    label = [
        text(20, y + 16, f"replica {replica}, stage {stage}", bold=True),
        text(20, y + 33, f"rank {stage * REPLICAS + replica}", 12, MUTED),
    ]
    parts = [*label, f'<rect x="{LEFT + 4}" y="{y}" width="{COLUMNS[-1] - LEFT - 4}" height="{BLOCK_HEIGHT}" rx="4" fill="#f8fafc"/>']
    parts += block(COLUMNS[0], y, 56, INTEGER, "plan") + block(COLUMNS[1], y, 60, INTEGER, "layout")
    parts += block(COLUMNS[3], y, 92, ENCODER, "ViT, VAE") + block(COLUMNS[5] + 38, y, 92, ENCODER, "ViT")
    for step in schedule():
        if step.stage == stage:
            name, fill, colour = ("B", BACKWARD, "#ffffff") if step.backward else ("F", FORWARD, INK)
            label_of_pass = f"{name}{replica * MICROBATCHES + step.microbatch}"
            parts += block(COLUMNS[4] + 2 + UNIT * step.start, y, UNIT * (step.end - step.start), fill, label_of_pass, colour)
    return parts + block(COLUMNS[7], y, 64, UPDATE, "AdamW") + block(COLUMNS[7] + 108, y, 48, UPDATE, "EMA")


def exchanges() -> list[str]:
    """Return the communication of the step, except what stages send each other inside the pipeline."""
    parts = []
    for replica in range(REPLICAS):
        rows = [(replica, stage) for stage in range(STAGES)]
        parts += exchange(COLUMNS[3] + 112, rows) + exchange(COLUMNS[5] + 16, rows)
    for stage in range(STAGES):
        rows = [(replica, stage) for replica in range(REPLICAS)]
        for x in (COLUMNS[2] + 18, COLUMNS[6] + 14, COLUMNS[7] + 77):
            parts += exchange(x + 18 * stage, rows)
    world = [(replica, stage) for replica in range(REPLICAS) for stage in range(STAGES)]
    return parts + exchange(COLUMNS[6] + 78, world)


def legend() -> list[str]:
    """Return the meaning of the colours, in one line at the bottom."""
    y, parts = HEIGHT - 26, []
    entries = ((FORWARD, "F forward of a pack", 180), (BACKWARD, "B backward of a pack", 190), (ENCODER, "image encoder", 150))
    x = LEFT + 10
    for fill, meaning, advance in (
        *entries,
        (INTEGER, "integers only", 140),
        (EXCHANGE, "communication between ranks", 230),
        ("#f8fafc", "idle", 60),
    ):
        edge = f' stroke="{MUTED}" stroke-width="0.5"' if meaning == "idle" else ""
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" rx="3" fill="{fill}"{edge}/>')
        parts.append(text(x + 21, y, meaning, 12))
        x += advance
    return parts


def svg() -> str:
    """Return the figure."""
    rows = [part for replica in range(REPLICAS) for stage in range(STAGES) for part in rank_row(replica, stage)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    return "\n".join([f'{head} font-family="Helvetica, Arial, sans-serif">', *frame(), *rows, *exchanges(), *legend(), "</svg>"]) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(svg(), encoding="utf-8")
