"""Reads what a picture of the sample world shows off its pixels, so that generated pictures are scored without any network.

Backgrounds are grey and shapes are chromatic, so saturation finds the shape, its hue gives the colour, its centre the place, and
the best overlap with drawn outlines its kind. Reads noisy and slightly misplaced pictures too.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_bagel.sample_world.world import BACKGROUNDS, COLOURS, POSITIONS, SHAPES, Scene, Shape, centre, render

# Saturation (largest minus smallest channel, 0 to 255) above which a pixel belongs to a shape: half of the palest colour's 125.
CHROMA_THRESHOLD = 60
# A shape covers at least this share of a cell of the 3 x 3 grid; less is noise. A small cross covers 27 % of a cell.
MIN_CELL_SHARE = 0.10
SEARCH = 3  # pixels around the found centre in which outlines are tried, at 64 pixels


@dataclass(frozen=True)
class Reading:
    """What was read: one shape with its share of overlap (0 to 1) with the ideal outline. None: no shape was found."""

    background: str
    shape: Shape | None
    overlap: float = 0.0


def nearest(colour: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    """The table's name whose colour is nearest to an RGB value [3] in Euclidean distance."""
    names = list(table)
    distances = ((np.array([table[name] for name in names], dtype=np.float64) - colour) ** 2).sum(axis=1)
    return names[int(distances.argmin())]


def chroma_mask(pixels: np.ndarray) -> np.ndarray:
    """bool [H, W] of the pixels that belong to a shape; `pixels` is uint8 [H, W, 3]. Smoothed over 3 x 3 against noise."""
    padded = np.pad(pixels.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = pixels.shape[:2]
    smooth = sum(padded[dy : dy + height, dx : dx + width] for dy in range(3) for dx in range(3)) / 9
    return smooth.max(axis=2) - smooth.min(axis=2) > CHROMA_THRESHOLD


def read_single(pixels: np.ndarray, sizes: tuple[str, ...] = ("large",)) -> Reading:
    """Reads a picture of one shape, uint8 [H, W, 3]; `sizes` are those the world has."""
    mask = chroma_mask(pixels)
    background = nearest(_median(pixels[~mask], pixels), BACKGROUNDS)
    if mask.mean() < MIN_CELL_SHARE / 9:
        return Reading(background, None)
    return Reading(background, *_read_shape(pixels, mask, sizes))


def read_scene(pixels: np.ndarray, sizes: tuple[str, ...] = ("large",)) -> Scene:
    """Reads a picture of any number of shapes, one per cell of the 3 x 3 grid at most."""
    mask = chroma_mask(pixels)
    height, width = mask.shape
    shapes = []
    for position in POSITIONS:
        x, y = centre(position, width, height)
        rows = slice(round(y - height / 6), round(y + height / 6))
        columns = slice(round(x - width / 6), round(x + width / 6))
        inside = np.zeros_like(mask)
        inside[rows, columns] = mask[rows, columns]
        if inside[rows, columns].mean() >= MIN_CELL_SHARE:
            shapes.append(_read_shape(pixels, inside, sizes)[0])
    return Scene(nearest(_median(pixels[~mask], pixels), BACKGROUNDS), tuple(shapes), width, height)


def _median(chosen: np.ndarray, all_pixels: np.ndarray) -> np.ndarray:
    return np.median(chosen if len(chosen) else all_pixels.reshape(-1, 3), axis=0)


def _read_shape(pixels: np.ndarray, mask: np.ndarray, sizes: tuple[str, ...]) -> tuple[Shape, float]:
    height, width = mask.shape
    ys, xs = np.nonzero(mask)
    core = pixels[_eroded(mask)]  # edge pixels are mixed with the background
    colour = nearest(_median(core, pixels[mask]), COLOURS)
    # The middle of the bounding box is the same point of every kind of shape; a triangle's centroid is not.
    box = (np.quantile(xs, [0.01, 0.99]).mean() + 0.5, np.quantile(ys, [0.01, 0.99]).mean() + 0.5)
    cells = [centre(position, width, height) for position in POSITIONS]
    position = POSITIONS[int(np.argmin([(x - box[0]) ** 2 + (y - box[1]) ** 2 for x, y in cells]))]
    overlap, kind, size = max((_overlap(mask, kind, size, box), kind, size) for kind in SHAPES for size in sizes)
    return Shape(colour, kind, position, size), overlap


def _eroded(mask: np.ndarray) -> np.ndarray:
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return inner


@lru_cache(maxsize=64)
def _outline_mask(kind: str, size: str, width: int, height: int) -> np.ndarray:
    """The mask an ideal shape in the centre gives, through the same smoothing as a real picture."""
    return chroma_mask(render(Scene("black", (Shape("red", kind, "center", size),), width, height)))


def _overlap(mask: np.ndarray, kind: str, size: str, box: tuple[float, float]) -> float:
    """Largest intersection over union of the mask with the ideal outline around the place found."""
    height, width = mask.shape
    ideal = _outline_mask(kind, size, width, height)
    dx, dy = round(box[0] - width / 2), round(box[1] - height / 2)
    reach = max(1, round(SEARCH * min(width, height) / 64))
    best = 0.0
    for sy in range(dy - reach, dy + reach + 1):
        for sx in range(dx - reach, dx + reach + 1):
            moved = _shifted(ideal, sy, sx)
            union = (mask | moved).sum()
            best = max(best, float((mask & moved).sum() / union))
    return best


def _shifted(mask: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """The mask moved down and right, empty where nothing moved in."""
    height, width = mask.shape
    out = np.zeros_like(mask)
    out[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = mask[
        max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)
    ]
    return out
