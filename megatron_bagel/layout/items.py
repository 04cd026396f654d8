# SPDX-License-Identifier: Apache-2.0
"""What a sample consists of before any tensor exists: an ordered list of items, each a text or an image.

An item carries only integers (token ids, pixel sizes, draws), so that every rank can hold the plan of every sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

ITEM_KINDS = ("text", "vit", "vae")


class Mode(IntEnum):
    """Attention mode of a split. Only a noise split itself can see its tokens."""

    CAUSAL = 0
    FULL = 1
    NOISE = 2


@dataclass(frozen=True)
class Item:
    """One entry of a sample's plan, in sequence order.

    ``kind`` is "text", "vit" (image for understanding) or "vae" (clean condition, or noised target if ``loss``).
    ``dropped`` marks a condition that dropout removed; a dropped image still advances the rope position by one.
    ``height`` and ``width`` are pixels after the image transform of the item's kind. ``special_token_label`` adds a
    cross-entropy target of weight 1 at the item's closing token. ``split_start`` and ``split_end`` let several images
    (frames of a clip) share one split; ``frame_delta`` is then the rope distance to the next frame. ``frame`` is the
    number of a frame where ``image`` is a video.
    """

    kind: str
    loss: bool = False
    dropped: bool = False
    ids: np.ndarray | None = None
    image: int = -1
    height: int = 0
    width: int = 0
    special_token_label: int | None = None
    split_start: bool = True
    split_end: bool = True
    frame_delta: int | None = None
    frame: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ITEM_KINDS:
            raise ValueError(f"item kind {self.kind!r} is unknown; use one of {', '.join(ITEM_KINDS)}")
        if self.kind == "text" and self.ids is None:
            raise ValueError("a text item needs its token ids (an empty array for an empty text)")
        if self.kind != "text" and (self.image < 0 or self.height <= 0 or self.width <= 0):
            raise ValueError(f"a {self.kind} item needs an image number and a size in pixels, got {self}")

    @property
    def token_ids(self) -> np.ndarray:
        """Token ids of a text. Raises ValueError for an image, which has none."""
        if self.ids is None:
            raise ValueError(f"a {self.kind} item has no token ids")
        return self.ids


@dataclass(frozen=True)
class Sample:
    """A training example: its origin, which keys all its random draws, and its items."""

    dataset: str
    index: int
    epoch: int
    items: tuple[Item, ...]
    group: str = ""
