"""Pictures of a run side by side, so that steps can be compared at a glance: what was given, what came out, what the data holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

#: Pixels around a tile, and the least height of a tile: small pictures are enlarged, so that one sees something.
MARGIN, TILE = 6, 128
BACKGROUND, INK = (236, 236, 236), (30, 30, 30)


@dataclass(frozen=True)
class SheetRow:
    """Pictures (uint8 [height, width, 3]) of one prompt, each with a word that says what it is, and the prompt itself."""

    prompt: str
    pictures: tuple[tuple[str, np.ndarray], ...]


def as_pixels(image: Tensor) -> np.ndarray:
    """A transformed image, float [3, H, W] in [-1, 1], as uint8 [H, W, 3]."""
    return ((image * 0.5 + 0.5).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def contact_sheet(rows: Sequence[SheetRow], columns: int = 2) -> Image.Image:
    """All rows in a grid, ``columns`` prompts beside each other. Raises ValueError when there is no picture."""
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
    tiles = [(word, _enlarged(picture)) for word, picture in row.pictures]
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
    for word, tile in tiles:
        pen.text((left, top), word, INK, font)
        cell.paste(tile, (left, top + line))
        left += tile.width + MARGIN
    return cell


def _enlarged(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture)
    factor = max(1, TILE // image.height)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """Up to ``most`` lines of words; what does not fit is cut off with dots. Signs the built-in font lacks become question marks."""
    lines, words = [""], text.encode("latin-1", "replace").decode("latin-1").split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] += " ..."
            break
    return lines
