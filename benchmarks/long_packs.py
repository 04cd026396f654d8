# SPDX-License-Identifier: Apache-2.0
"""Packs of 32k tokens of the kinds that make attention uneven, and how long something takes on one core."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec, build_pack

LONG = LayoutSpec(bos=1, eos=2, start_of_image=3, end_of_image=4)
TOKENS = 32768


def _text(tokens: int) -> Item:
    return Item("text", ids=np.zeros(tokens - 2, dtype=np.int64), loss=True)


def _image(kind: str, side: int, loss: bool = False) -> Item:
    stride = 14 if kind == "vit" else 16
    return Item(kind, loss=loss, image=0, height=side * stride, width=side * stride)


def _filled(sample: Callable[[np.random.Generator], tuple[Item, ...]]) -> list[Sample]:
    """Random samples up to 32k tokens, the last one a text that fills the pack."""
    generator, made, used = np.random.default_rng(0), [], 0
    while True:
        items = sample(generator)
        pack = build_pack([Sample("set", len(made), 0, items)], LONG)
        if used + pack.sequence_length > TOKENS - 2:
            return [*made, Sample("set", len(made), 0, (_text(TOKENS - used),))]
        made.append(Sample("set", len(made), 0, items))
        used += pack.sequence_length


def text_heavy() -> list[Sample]:
    """Texts of very different length, now and then with a picture."""
    return _filled(lambda g: (_text(int(g.geometric(1 / 900)) + 2), *([_image("vit", 12)] if g.random() < 0.2 else [])))


def image_heavy() -> list[Sample]:
    """Text to image and editing: pictures of very different size, clean and noised."""

    def sample(g: np.random.Generator) -> tuple[Item, ...]:
        side = int(g.integers(8, 64))
        sources = [_image("vae", side), _image("vit", side), _text(30)] if g.random() < 0.4 else []
        return (_text(int(g.integers(5, 80))), *sources, _image("vae", side, loss=True))

    return _filled(sample)


def one_long_image_sequence() -> list[Sample]:
    """A single sample of many large pictures: later ones see all earlier ones."""
    pictures = [item for _ in range(3) for item in (_image("vae", 64), _image("vit", 64))]
    items = (_text(50), *pictures, _image("vae", 64, loss=True))
    missing = TOKENS - build_pack([Sample("set", 0, 0, items)], LONG).sequence_length
    return [Sample("set", 0, 0, (*items, _text(missing)))]


def one_long_text() -> list[Sample]:
    """The steepest mask: the last token sees 32k keys, the first only itself."""
    return [Sample("set", 0, 0, (_text(TOKENS),))]


KINDS = [text_heavy, image_heavy, one_long_image_sequence, one_long_text]


def quickest(make: Callable[[], object], tries: int = 5) -> float:
    """Processor seconds of the fastest try: other processes of the machine do not count."""
    spent = []
    for _ in range(tries):
        start = time.process_time()
        make()
        spent.append(time.process_time() - start)
    return min(spent)
