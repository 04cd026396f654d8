# SPDX-License-Identifier: Apache-2.0
"""A world of coloured shapes that a laptop can master, drawn here so that every picture's truth is known.

A scene is a background and some shapes, each with a colour, a size and one of nine positions. Scenes come from a keyed generator, so
picture i of a dataset is the same regardless of the other pictures and of the number of processes. text.py has the words about a scene
(captions, questions, edits), and score.py reads a picture back.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from megatron_bagel.common.json_files import read_json

Choice = TypeVar("Choice")

# Shape colours are chromatic and backgrounds are grey, so saturation alone separates a shape from any background.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 25),
    "green": (20, 150, 50),
    "blue": (35, 60, 225),
    "yellow": (245, 225, 30),
    "orange": (255, 135, 0),
    "purple": (130, 35, 175),
    "cyan": (30, 205, 225),
    "pink": (255, 120, 195),
}
#: Colours that no world has unless it names them: what a model that knows the others can be taught.
NEW_COLOURS: dict[str, tuple[int, int, int]] = {"brown": (130, 75, 20), "lime": (160, 235, 80)}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
POSITIONS: tuple[str, ...] = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip
# Side of a shape's bounding box as a fraction of the picture's short side: 15 and 20 pixels of 64.
SIZES: dict[str, float] = {"small": 15 / 64, "large": 20 / 64}
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Shape:
    """One shape of a scene; every field is a word of the tables above."""

    colour: str
    shape: str
    position: str
    size: str = "large"


@dataclass(frozen=True)
class Scene:
    """The content of a picture. Shapes are in reading order of their positions, at most one per position."""

    background: str
    shapes: tuple[Shape, ...]
    width: int = 64
    height: int = 64


@dataclass(frozen=True)
class World:
    """The words that scenes are drawn from. The defaults are the first world: one large shape per picture.

    ``held_out`` contains (colour, shape) pairs that ``draw_scene`` never makes; a model that handles them generalises.
    """

    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    shapes: tuple[str, ...] = SHAPES
    positions: tuple[str, ...] = POSITIONS
    sizes: tuple[str, ...] = ("large",)
    max_count: int = 1
    picture_sizes: tuple[tuple[int, int], ...] = ((64, 64),)
    held_out: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    def __post_init__(self) -> None:
        """Check the words. Raises ValueError for one the renderer does not know, an empty list, or a world without any allowed pair."""
        words_by_field = {
            "colours": COLOURS | NEW_COLOURS,
            "backgrounds": BACKGROUNDS,
            "shapes": SHAPES,
            "positions": POSITIONS,
            "sizes": SIZES,
        }
        for name, words in words_by_field.items():
            selected = getattr(self, name)
            unknown = [word for word in selected if word not in words]
            if unknown or not selected:
                raise ValueError(f"the sample world's {name} must be some of {', '.join(words)}; got {', '.join(selected) or 'none'}")
        if not 1 <= self.max_count <= len(self.positions):
            raise ValueError(f"a picture holds 1 to {len(self.positions)} shapes (one per position), not {self.max_count}")
        for width, height in self.picture_sizes:
            if min(width, height) < 32:
                raise ValueError(f"pictures of {width}x{height} pixels are too small to tell shapes apart; use sides of 32 or more")
        if not self.pairs():
            raise ValueError("every (colour, shape) pair of the sample world is held out, so none can be drawn")

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Return all (colour, shape) pairs that may be drawn."""
        return tuple((c, s) for c in self.colours for s in self.shapes if (c, s) not in self.held_out)


def read_world(path: Path) -> World:
    """Return the world that ``data sample`` wrote down in ``world.json``. Raises ValueError if the file is missing or no JSON."""
    described = read_json(path, "the description that `data sample` writes beside its data")["world"]
    values = {item.name: described[item.name] for item in fields(World) if item.name in described}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    values["picture_sizes"] = tuple(tuple(size) for size in values["picture_sizes"])
    values["held_out"] = frozenset(tuple(pair) for pair in values["held_out"])
    return World(**values)


def parse_pairs(texts: Sequence[str]) -> frozenset[tuple[str, str]]:
    """Parse ["red:circle", ...] as {("red", "circle"), ...}. Raises ValueError for anything but a known colour and shape."""
    pairs = set()
    for text in texts:
        colour, _, shape = text.partition(":")
        if colour not in COLOURS or shape not in SHAPES:
            raise ValueError(f"held-out pair '{text}' is not colour:shape with a colour of {', '.join(COLOURS)} "
                             f"and a shape of {', '.join(SHAPES)}")  # fmt: skip
        pairs.add((colour, shape))
    return frozenset(pairs)


def pick(rng: np.random.Generator, choices: Sequence[Choice]) -> Choice:
    """Return one of the choices, uniformly; unlike Generator.choice it keeps the Python type (tuples stay tuples)."""
    return choices[int(rng.integers(len(choices)))]


def draw_scene(world: World, rng: np.random.Generator) -> Scene:
    """Draw a random scene of the world: 1 to ``max_count`` shapes, with all allowed words equally likely."""
    count = int(rng.integers(1, world.max_count + 1))
    position_indices = sorted(rng.permutation(len(world.positions))[:count], key=lambda p: POSITIONS.index(world.positions[p]))
    shapes = []
    for position_index in position_indices:
        colour, shape = pick(rng, world.pairs())
        shapes.append(Shape(colour, shape, world.positions[position_index], pick(rng, world.sizes)))
    width, height = pick(rng, world.picture_sizes)
    return Scene(pick(rng, world.backgrounds), tuple(shapes), width, height)


def centre(position: str, width: int, height: int) -> tuple[float, float]:
    """Return the (x, y) in pixels of a named position: the centre of its cell in a 3 x 3 grid over the picture."""
    row, column = divmod(POSITIONS.index(position), 3)
    return (column + 0.5) * width / 3, (row + 0.5) * height / 3


def outline(shape: str, x: float, y: float, side: float) -> list[tuple[float, float]]:
    """Return the corners of a shape in a bounding box of ``side`` around (x, y); for the circle, two corners of the box."""
    r = side / 2
    if shape == "circle":
        return [(x - r, y - r), (x + r, y + r)]
    if shape == "square":
        r *= 0.9  # so that the square's area is near the circle's
        return [(x - r, y - r), (x + r, y - r), (x + r, y + r), (x - r, y + r)]
    if shape == "triangle":
        return [(x, y - r), (x + r, y + r), (x - r, y + r)]
    a = side / 6  # half the width of the cross's arms
    return [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a), (x + a, y + a),
            (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a), (x - r, y - a), (x - a, y - a)]  # fmt: skip


def render(scene: Scene) -> np.ndarray:
    """Render the scene's picture, uint8 [height, width, 3], with anti-aliased edges."""
    n = SUPERSAMPLING
    canvas = Image.new("RGB", (scene.width * n, scene.height * n), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        x, y = centre(shape.position, scene.width, scene.height)
        side = SIZES[shape.size] * min(scene.width, scene.height)
        points = [(px * n - 0.5, py * n - 0.5) for px, py in outline(shape.shape, x, y, side)]
        draw = pen.ellipse if shape.shape == "circle" else pen.polygon
        draw(points, fill=(COLOURS | NEW_COLOURS)[shape.colour])
    return np.asarray(canvas.resize((scene.width, scene.height), Image.Resampling.BOX))


def to_png(pixels: np.ndarray) -> bytes:
    """Return the PNG file content of a uint8 [height, width, 3] picture; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
