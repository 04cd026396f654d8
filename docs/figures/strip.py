# SPDX-License-Identifier: Apache-2.0
"""Draws the picture strip of the README: the small world's pictures from words, edits and marks, and the loss curves of a quickstart.

python docs/figures/strip.py                              # from docs/images and the losses that are kept
python docs/figures/strip.py quickstart_output            # with the losses of this run of the quickstart, which it keeps beside itself
"""

from __future__ import annotations

import csv
import io
import math
import sys
from pathlib import Path

from PIL import Image

from megatron_bagel.common.json_files import json_lines

IMAGES = Path(__file__).resolve().parent.parent / "images"
LOSSES = Path(__file__).resolve().parent / "quickstart_losses.csv"
#: Rows of the small world's sheet of pictures, eight pictures each: from words, and edits as before and after.
ROWS = (4, 13)
WIDTH = 1600
#: Columns of the table of losses: the metric of the run, and what the curve is called.
CURVES = {"mse/t2i_pretrain": "pictures from words", "mse/unified_edit": "edits"}
_DOTS_PER_INCH = 100
_AVERAGED = 5  # logged steps that a point of a curve is the mean of


def strip() -> Image.Image:
    """Return the strip: rows of pictures, the curves of marks below them, and the losses below those."""
    sheet, marks = (Image.open(IMAGES / f"small_world_{name}.png").convert("RGB") for name in ("grid", "marks"))
    side = sheet.width // 8
    pictures = Image.new("RGB", (sheet.width, side * len(ROWS)), "white")
    for position, row in enumerate(ROWS):
        pictures.paste(sheet.crop((0, row * side, sheet.width, (row + 1) * side)), (0, position * side))
    parts = [_wide(pictures), _wide(marks), _wide(loss_curves(read_losses()))]
    result = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    for position, part in enumerate(parts):
        result.paste(part, (0, sum(above.height for above in parts[:position])))
    return result


def _wide(picture: Image.Image) -> Image.Image:
    return picture.resize((WIDTH, WIDTH * picture.height // picture.width), Image.Resampling.LANCZOS)


def keep_losses(run: Path) -> None:
    """Write the losses of the second lesson of a quickstart, one logged step a line."""
    rows = [row for _, row in json_lines(run / "results" / "metrics.jsonl", "strip")]
    with LOSSES.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", *CURVES])
        table.writerows([row["step"], *(f"{row[name]:.4f}" if name in row else "" for name in CURVES)] for row in rows)


def read_losses() -> dict[str, list[float]]:
    """Return the columns of the table of losses by name, "step" among them. A step without samples of a kind has no loss of it: nan."""
    with LOSSES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or "nan") for row in rows] for name in ("step", *CURVES)}


def loss_curves(losses: dict[str, list[float]]) -> Image.Image:
    """Draw each loss over the steps, as logged and as a running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / _DOTS_PER_INCH, 3.2), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    for metric, label in CURVES.items():
        values = losses[metric]
        means = [_mean(values[max(0, i + 1 - _AVERAGED) : i + 1]) for i in range(len(values))]
        (line,) = axes.plot(losses["step"], means, label=label)
        axes.plot(losses["step"], values, color=line.get_color(), alpha=0.3)
    axes.set(title="loss of a quickstart", xlabel="step", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return Image.open(drawn).convert("RGB")


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep_losses(Path(sys.argv[1]))
    strip().quantize(256).save(IMAGES / "strip.png", optimize=True)
