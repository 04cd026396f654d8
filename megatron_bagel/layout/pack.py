# SPDX-License-Identifier: Apache-2.0
"""From samples to one pack: every integer that a step needs, in sequence order, without reading a pixel.

The fields have the order and values of the original's packed batch, so they can be compared one by one. The padding
document of its flex mode is not part of a pack: padding belongs to the order of a rank (``layout/order.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from megatron_bagel.layout.items import Item, Mode, Sample


@dataclass(frozen=True)
class LayoutSpec:
    """The settings that a layout depends on. ``vae_downsample`` is pixels per latent token side (latent_patch_size * 8)."""

    bos: int
    eos: int
    start_of_image: int
    end_of_image: int
    vit_patch: int = 14
    vit_max_side: int = 70
    vae_downsample: int = 16
    max_latent_size: int = 64
    interpolate_pos: bool = False


@dataclass(frozen=True)
class PackImage:
    """One encoded image of a pack. ``draw`` numbers the timestep draws inside the sample; frames of one clip share one.

    ``frame`` is the number of a frame where ``image`` is a video.
    """

    kind: str
    sample: int
    image: int
    height: int
    width: int
    noised: bool
    draw: int
    tokens: int
    frame: int | None = None


@dataclass(frozen=True)
class Pack:
    """One pack in sequence order; arrays are int64 unless noted.

    ``text_positions``, ``vae_positions``, ``vit_positions``, ``ce_positions`` and ``mse_positions`` are indices into the
    sequence. ``position_ids`` [sequence_length] are RoPE positions. ``latent_shapes`` and ``vit_shapes`` [images, 2] are
    (rows, columns) of tokens. ``ce_weights`` is float32.
    """

    sequence_length: int
    sample_lens: np.ndarray
    split_lens: np.ndarray
    split_modes: np.ndarray
    text_ids: np.ndarray
    text_positions: np.ndarray
    position_ids: np.ndarray
    vae_positions: np.ndarray
    latent_shapes: np.ndarray
    latent_position_ids: np.ndarray
    vit_positions: np.ndarray
    vit_position_ids: np.ndarray
    vit_shapes: np.ndarray
    ce_positions: np.ndarray
    labels: np.ndarray
    ce_weights: np.ndarray
    mse_positions: np.ndarray
    images: tuple[PackImage, ...] = ()
    samples: tuple[Sample, ...] = ()

    def images_of(self, kind: str) -> list[PackImage]:
        """Return the images of one kind, in sequence order."""
        return [image for image in self.images if image.kind == kind]

    def sample_numbers(self, positions: np.ndarray) -> np.ndarray:
        """Return which of ``samples`` the tokens at sequence ``positions`` [n] belong to, int64 [n]."""
        documents = np.searchsorted(np.cumsum(self.sample_lens), positions, side="right")
        if len(self.samples) in (0, len(self.sample_lens)):
            return documents
        # ``sample_lens`` leaves out samples whose items are all dropped.
        return np.flatnonzero([any(not item.dropped for item in sample.items) for sample in self.samples])[documents]


def grid_position_ids(rows: int, cols: int, side: int, interpolate: bool) -> np.ndarray:
    """Return row-major ids [rows * cols] into a [side, side] position table.

    With ``interpolate``, rows and columns are spread over ``side`` equal bins (nearest bin). Otherwise an id is
    row * side + column.
    """
    if interpolate:
        r, c = _interpolated_bins(rows, side), _interpolated_bins(cols, side)
    else:
        r, c = np.arange(rows, dtype=np.int64), np.arange(cols, dtype=np.int64)
    return (r[:, None] * side + c[None, :]).reshape(-1)


@lru_cache(maxsize=1024)
def _interpolated_bins(cells: int, side: int) -> np.ndarray:
    """Return the bin in [0, side) of each of ``cells`` positions, int64 [cells], by the original's float32 arithmetic.

    Bin edges and positions are multiples of 1 / ``side`` and 1 / ``cells`` as ``torch.arange`` rounds them. Where the exact values
    coincide, the rounding decides on which side of an edge a position falls, so exact integers would give other bins.
    """
    edges = torch.arange(1 / side, 1.0, 1 / side, dtype=torch.float32)
    positions = torch.arange(0, 1 - 1e-6, 1 / cells, dtype=torch.float32)
    return torch.bucketize(positions, edges, right=True).numpy()


def item_grid(item: Item, spec: LayoutSpec) -> tuple[int, int]:
    """Return (rows, columns) of the tokens of an image item."""
    stride = spec.vit_patch if item.kind == "vit" else spec.vae_downsample
    return item.height // stride, item.width // stride


def item_tokens(item: Item, spec: LayoutSpec) -> int:
    """Return the sequence length of an item with its two border tokens, or 0 if it is dropped."""
    if item.dropped:
        return 0
    if item.kind == "text":
        return len(item.token_ids) + 2
    rows, cols = item_grid(item, spec)
    return rows * cols + 2


def sample_tokens(sample: Sample, spec: LayoutSpec) -> int:
    """Return the sequence length of a sample."""
    return sum(item_tokens(item, spec) for item in sample.items)


@dataclass
class _Builder:
    """The running state of packing: one list per field, and four counters."""

    spec: LayoutSpec
    cursor: int = 0
    rope: int = 0
    split: int = 0
    draws: int = 0
    lists: dict[str, list[Any]] = field(default_factory=lambda: {name: [] for name in _FIELDS})

    def token(self, token_id: int) -> None:
        self.lists["text_ids"].append(token_id)
        self.lists["text_positions"].append(self.cursor)
        self.cursor += 1

    def closing(self, token_id: int, label: int | None) -> None:
        if label is not None:
            self.ce(np.array([self.cursor]), [label], 1.0)
        self.token(token_id)

    def ce(self, positions: np.ndarray, labels: Sequence[int], weight: float) -> None:
        self.lists["ce_positions"].extend(positions)
        self.lists["labels"].extend(labels)
        self.lists["ce_weights"].extend([weight] * len(labels))

    def text(self, item: Item) -> None:
        start, ids = self.cursor, [int(i) for i in item.token_ids]
        for token_id in (self.spec.bos, *ids):
            self.token(token_id)
        if item.loss:
            # Each of the n + 1 shifted tokens of a text weighs (n + 1) ** -0.5.
            self.ce(np.arange(start, self.cursor), [*ids, self.spec.eos], (len(ids) + 1) ** -0.5)
        self.closing(self.spec.eos, item.special_token_label)
        length = self.cursor - start
        self.lists["position_ids"].extend(range(self.rope, self.rope + length))
        self.rope += length

    def picture(self, item: Item, sample: int) -> None:
        rows, cols = item_grid(item, self.spec)
        count, start = rows * cols, self.cursor
        self.token(self.spec.start_of_image)
        positions = range(self.cursor, self.cursor + count)
        if item.kind == "vit":
            table = grid_position_ids(rows, cols, self.spec.vit_max_side, self.spec.interpolate_pos)
            names = ("vit_positions", "vit_shapes", "vit_position_ids")
        else:
            table = grid_position_ids(rows, cols, self.spec.max_latent_size, self.spec.interpolate_pos)
            names = ("vae_positions", "latent_shapes", "latent_position_ids")
        self.lists[names[0]].extend(positions)
        self.lists[names[1]].append((rows, cols))
        self.lists[names[2]].extend(table)
        noised = item.kind == "vae" and item.loss
        if noised:
            self.lists["mse_positions"].extend(positions)
            self.draws += item.split_start
        self.lists["images"].append(
            PackImage(item.kind, sample, item.image, item.height, item.width, noised, max(self.draws - 1, 0), count, item.frame)
        )
        self.cursor += count
        self.closing(self.spec.end_of_image, item.special_token_label)
        self.lists["position_ids"].extend([self.rope] * (self.cursor - start))
        self.advance_rope(item)

    def advance_rope(self, item: Item) -> None:
        """Advance the RoPE position after an image. A noised target shares its position with the clean copy that follows it."""
        if item.frame_delta is not None:
            self.rope += item.frame_delta
        elif not (item.kind == "vae" and item.loss):
            self.rope += 1

    def add(self, sample: Sample, number: int) -> None:
        begin, self.rope, self.draws = self.cursor, 0, 0
        for item in sample.items:
            if item.dropped:
                # A dropped image still takes a RoPE position, and a dropped text takes none.
                self.rope += item.kind != "text"
                continue
            if item.split_start:
                self.split = self.cursor
                self.lists["split_modes"].append(split_mode(item))
            if item.kind == "text":
                self.text(item)
            else:
                self.picture(item, number)
            if item.split_end:
                self.lists["split_lens"].append(self.cursor - self.split)
        self.lists["sample_lens"].append(self.cursor - begin)


_FIELDS: tuple[str, ...] = (
    "sample_lens", "split_lens", "split_modes", "text_ids", "text_positions", "position_ids", "vae_positions",
    "latent_shapes", "latent_position_ids", "vit_positions", "vit_position_ids", "vit_shapes", "ce_positions",
    "labels", "ce_weights", "mse_positions", "images",
)  # fmt: skip


def split_mode(first_item: Item) -> Mode:
    """Return the attention mode of the split that ``first_item`` opens: noised clips (``frame_delta``) are full, noised images noise."""
    if first_item.kind == "text":
        return Mode.CAUSAL
    if first_item.kind == "vae" and first_item.loss and first_item.frame_delta is None:
        return Mode.NOISE
    return Mode.FULL


def build_pack(samples: Sequence[Sample], spec: LayoutSpec) -> Pack:
    """Lay samples end to end.

    A sample whose items are all dropped contributes no token and no document.
    """
    builder = _Builder(spec)
    for number, sample in enumerate(samples):
        builder.add(sample, number)
    arrays: dict[str, np.ndarray] = {}
    for name, values in builder.lists.items():
        if name == "images":
            continue
        if name == "ce_weights":
            arrays[name] = np.array(values, dtype=np.float32)
        elif name.endswith("_shapes"):
            arrays[name] = np.array(values, dtype=np.int64).reshape(-1, 2)
        else:
            arrays[name] = np.array(values, dtype=np.int64)
    arrays["sample_lens"] = arrays["sample_lens"][arrays["sample_lens"] > 0]
    return Pack(builder.cursor, images=tuple(builder.lists["images"]), samples=tuple(samples), **arrays)
