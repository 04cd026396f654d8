# SPDX-License-Identifier: Apache-2.0
"""What the drawn figures of the pages share: colours, and SVG elements as strings."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape

IMAGES = Path(__file__).resolve().parent.parent / "images"
INK, MUTED, GRID = "#1f2937", "#64748b", "#e5e7eb"
#: Kinds of tokens: text, images for understanding, clean and noised images for generation, padding.
TEXT, VIT, CLEAN, NOISED, PADDING = "#93c5fd", "#86efac", "#fcd34d", "#fca5a5", "#f1f5f9"


def text(x: float, y: float, content: str, size: int = 13, colour: str = INK, anchor: str = "start", bold: bool = False) -> str:
    """Return a line of text whose baseline is at ``y``."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>{escape(content)}</text>'


def rectangle(x: float, y: float, width: float, height: float, fill: str, edge: str = "", radius: float = 2) -> str:
    """Return a filled rectangle, with an edge if a colour is given for it."""
    stroke = f' stroke="{edge}"' if edge else ""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}"{stroke}/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str = MUTED, width: float = 1, arrow: bool = False) -> str:
    """Return a straight line, with a head at its end if it is an arrow."""
    head = ' marker-end="url(#head)"' if arrow else ""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="{width:g}"{head}/>'


def legend(x: float, y: float, entries: Iterable[tuple[str, str]], advance: float = 22) -> list[str]:
    """Return (colour, meaning) entries below each other."""
    parts = []
    for number, (fill, meaning) in enumerate(entries):
        top = y + number * advance
        parts += [rectangle(x, top - 11, 14, 14, fill, edge=MUTED, radius=3), text(x + 21, top, meaning, 12)]
    return parts


def figure(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """Return a whole figure: white background, title, and the parts."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{MUTED}"/></marker></defs>'
    )
    start = [f'{head} font-family="Helvetica, Arial, sans-serif">', marker, rectangle(0, 0, width, height, "#ffffff", radius=0)]
    return "\n".join([*start, text(20, 32, title, 17, bold=True), *parts, "</svg>"]) + "\n"


def write(path: Path, content: str) -> None:
    """Write a figure and say where it is."""
    path.write_text(content, encoding="utf-8")
    print(path)
