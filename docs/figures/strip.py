# SPDX-License-Identifier: Apache-2.0
"""Draws the picture strip of the README from the small world's pictures and marks: pictures from words, edits, and how marks rise.

python docs/figures/strip.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

IMAGES = Path(__file__).resolve().parent.parent / "images"
#: Rows of the small world's sheet of pictures, eight pictures each: from words, and edits as before and after.
ROWS = (4, 13)
WIDTH = 1600


def strip() -> Image.Image:
    """Return the strip: rows of pictures at the left, the curves of marks at the right."""
    sheet, curves = (Image.open(IMAGES / f"small_world_{name}.png").convert("RGB") for name in ("grid", "marks"))
    side = sheet.width // 8
    pictures = Image.new("RGB", (sheet.width, side * len(ROWS)), "white")
    for position, row in enumerate(ROWS):
        pictures.paste(sheet.crop((0, row * side, sheet.width, (row + 1) * side)), (0, position * side))
    height = WIDTH * curves.height // curves.width
    left = pictures.resize((WIDTH, WIDTH * pictures.height // pictures.width), Image.Resampling.LANCZOS)
    result = Image.new("RGB", (WIDTH, left.height + height), "white")
    result.paste(left, (0, 0))
    result.paste(curves.resize((WIDTH, height), Image.Resampling.LANCZOS), (0, left.height))
    return result


if __name__ == "__main__":
    strip().quantize(128).save(IMAGES / "strip.png", optimize=True)
