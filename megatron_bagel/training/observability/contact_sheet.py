# SPDX-License-Identifier: Apache-2.0
"""Draws pictures of a run side by side, to compare steps at a glance: the conditions, the sampled picture, and the data's picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

#: Pixels around a tile, and the smallest height of a tile. Smaller pictures are enlarged.
MARGIN, TILE = 6, 128
BACKGROUND, INK = (236, 236, 236), (30, 30, 30)


@dataclass(frozen=True)
class SheetRow:
    """A prompt and its pictures (uint8 [height, width, 3]), each with a caption."""

    prompt: str
    pictures: tuple[tuple[str, np.ndarray], ...]


def as_pixels(image: Tensor) -> np.ndarray:
    """Convert a transformed image, float [3, H, W] in [-1, 1], to uint8 [H, W, 3]."""
    return ((image * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def contact_sheet(rows: Sequence[SheetRow], columns: int = 2) -> Image.Image:
    """Draw all rows in a grid with ``columns`` prompts beside each other. Raises ValueError if there is no picture."""
    if not any(row.pictures for row in rows):
        raise ValueError("a contact sheet needs at least one picture")
    cells = [_cell(row) for row in rows]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    columns = min(columns, len(cells))
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), BACKGROUND)
    for number, cell in enumerate(cells):
        sheet.paste(cell, (number % columns * width, number // columns * height))
    return sheet


def _cell(row: SheetRow) -> Image.Image:
    """Draw one prompt above its pictures."""
    tiles = [(caption, _enlarged(picture)) for caption, picture in row.pictures]
    font = ImageFont.load_default()
    line = 14
    width = max(sum(tile.width + MARGIN for _, tile in tiles) + MARGIN, 2 * TILE)
    lines = _wrapped(row.prompt, font, width - 2 * MARGIN)
    cell = Image.new("RGB", (width, line * (len(lines) + 1) + max(tile.height for _, tile in tiles) + 3 * MARGIN), BACKGROUND)
    pen, top = ImageDraw.Draw(cell), MARGIN
    for text in lines:
        pen.text((MARGIN, top), text, INK, font)
        top += line
    left = MARGIN
    for caption, tile in tiles:
        pen.text((left, top), caption, INK, font)
        cell.paste(tile, (left, top + line))
        left += tile.width + MARGIN
    return cell


def _enlarged(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    factor = max(1, TILE // image.height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, max_lines: int = 3) -> list[str]:
    """Wrap ``text`` into up to ``max_lines`` lines and end a longer text with dots. Characters not in the font become question marks."""
    lines, words = [""], text.encode("latin-1", "replace").decode("latin-1").split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < max_lines:
            lines.append(word)
        else:
            lines[-1] += " ..."
            break
    return lines
