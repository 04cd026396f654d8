# SPDX-License-Identifier: Apache-2.0
"""The pack that the figures draw: a picture to draw, an edit, and a text to learn, laid out by the package's own code."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from megatron_bagel.layout.items import Item, Sample  # noqa: E402
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack  # noqa: E402

#: Slots of a rank, of which the last ones are padding.
MAX_NUM_TOKENS = 48
NAMES = ("text to image", "edit", "text")
_SPEC = LayoutSpec(bos=1, eos=2, start_of_image=3, end_of_image=4, vit_patch=14, vae_downsample=16)


def _text(length: int, loss: bool = False) -> Item:
    return Item("text", loss=loss, ids=np.arange(10, 10 + length))


def _image(kind: str, rows: int, columns: int, loss: bool = False, image: int = 0) -> Item:
    side = _SPEC.vit_patch if kind == "vit" else _SPEC.vae_downsample
    return Item(kind, loss=loss, image=image, height=rows * side, width=columns * side)


def example_pack() -> Pack:
    """Return the pack."""
    samples = (
        (_text(3), _image("vae", 2, 3, loss=True)),
        (_image("vae", 2, 2), _image("vit", 2, 2), _text(3), _image("vae", 2, 2, loss=True, image=1)),
        (_text(5, loss=True),),
    )
    return build_pack([Sample(name, 0, 0, items) for name, items in zip(NAMES, samples, strict=True)], _SPEC)


def token_kinds(pack: Pack) -> list[str]:
    """Return the kind of every token in sequence order: text, vit, clean or noised."""
    kinds = np.full(pack.sequence_length, "text", dtype=object)
    kinds[pack.vit_positions] = "vit"
    kinds[pack.vae_positions] = "clean"
    kinds[pack.mse_positions] = "noised"
    return kinds.tolist()
