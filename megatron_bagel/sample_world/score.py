# SPDX-License-Identifier: Apache-2.0
"""Reads a picture of the sample world from its pixels, so that generated pictures are scored without any network.

Backgrounds are grey and shapes are chromatic. Saturation therefore finds the shape, its hue gives the colour, its centre the position,
and the best overlap with drawn outlines its kind. It also reads noisy and slightly misplaced pictures.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_bagel.sample_world.world import BACKGROUNDS, COLOURS, NEW_COLOURS, POSITIONS, SHAPES, Scene, Shape, centre, render

# Saturation (largest minus smallest channel, 0 to 255) above which a pixel belongs to a shape: half of the palest colour's 125.
CHROMA_THRESHOLD = 60
# A shape covers at least this share of a cell of the 3 x 3 grid; less is noise. A small cross covers 27 % of a cell.
MIN_CELL_SHARE = 0.10
SEARCH = 3  # pixels around the found centre in which outlines are tried, at 64 pixels


@dataclass(frozen=True)
class Reading:
    """The content of a picture: its shape, or None if no shape was found."""

    background: str
    shape: Shape | None


def nearest(colour: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    """Return the table's name whose colour is nearest to an RGB value [3] in Euclidean distance."""
    names = list(table)
    distances = ((np.array([table[name] for name in names], dtype=np.float64) - colour) ** 2).sum(axis=1)
    return names[int(distances.argmin())]


def chroma_mask(pixels: np.ndarray) -> np.ndarray:
    """Return which pixels of ``pixels`` (uint8 [H, W, 3]) belong to a shape, bool [H, W], smoothed over 3 x 3 against noise."""
    padded = np.pad(pixels.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    smooth = np.asarray(sum(padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3))) / 9
    return smooth.max(axis=2) - smooth.min(axis=2) > CHROMA_THRESHOLD


def read_single(pixels: np.ndarray, sizes: tuple[str, ...] = ("large",), colours: tuple[str, ...] = tuple(COLOURS)) -> Reading:
    """Read a picture of one shape, uint8 [H, W, 3]; ``sizes`` and ``colours`` are those of the world."""
    mask = chroma_mask(pixels)
    background = nearest(_median(pixels[~mask], pixels), BACKGROUNDS)
    if mask.mean() < MIN_CELL_SHARE / 9:
        return Reading(background, None)
    return Reading(background, _read_shape(pixels, mask, sizes, colours))


def _median(selected: np.ndarray, all_pixels: np.ndarray) -> np.ndarray:
    return np.median(selected if len(selected) else all_pixels.reshape(-1, 3), axis=0)


def _read_shape(pixels: np.ndarray, mask: np.ndarray, sizes: tuple[str, ...], colours: tuple[str, ...]) -> Shape:
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    core = pixels[_eroded(mask)]  # edge pixels are mixed with the background
    colour = nearest(_median(core, pixels[mask]), {name: (COLOURS | NEW_COLOURS)[name] for name in colours})
    # The middle of the bounding box is the same point of every kind of shape, unlike the centroid of a triangle.
    box = (np.quantile(xs, [0.01, 0.99]).mean() + 0.5, np.quantile(ys, [0.01, 0.99]).mean() + 0.5)
    cells = [centre(position, width, height) for position in POSITIONS]
    position = POSITIONS[int(np.argmin([(x - box[0]) ** 2 + (y - box[1]) ** 2 for x, y in cells]))]
    _, kind, size = max((_overlap(mask, kind, size, box), kind, size) for kind in SHAPES for size in sizes)
    return Shape(colour, kind, position, size)


def _eroded(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


@lru_cache(maxsize=64)
def _outline_mask(kind: str, size: str, width: int, height: int) -> np.ndarray:
    """Return the mask of an ideal shape in the centre, after the same smoothing as a real picture."""
    return chroma_mask(render(Scene("black", (Shape("red", kind, "center", size),), width, height)))


def _overlap(mask: np.ndarray, kind: str, size: str, box: tuple[float, float]) -> float:
    """Return the largest intersection over union of the mask with the ideal outline near the shape's position."""
    height, width = mask.shape
    ideal = _outline_mask(kind, size, width, height)
    dx, dy = round(box[0] - width / 2), round(box[1] - height / 2)
    reach = max(1, round(SEARCH * min(width, height) / 64))
    best_overlap = 0.0
    for sy in range(dy - reach, dy + reach + 1):
        for sx in range(dx - reach, dx + reach + 1):
            moved = _shifted(ideal, sy, sx)
            union = (mask | moved).sum()
            best_overlap = max(best_overlap, float((mask & moved).sum() / union))
    return best_overlap


def _shifted(mask: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """Return the mask moved down and right, with empty pixels at the edges it left."""
    height, width = mask.shape
    shifted = np.zeros_like(mask)
    shifted[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
        max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)
    ]
    return shifted
