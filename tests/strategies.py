# SPDX-License-Identifier: Apache-2.0
"""Random packs for property tests: samples of every shape the layout allows, small enough for dense oracles."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import LayoutSpec

SPEC = LayoutSpec(bos=1, eos=2, start_of_image=3, end_of_image=4, vit_patch=14, vit_max_side=16, vae_downsample=16, max_latent_size=16)


@st.composite
def items(draw: st.DrawFn, kinds: tuple[str, ...]) -> Item:
    """One text or image item."""
    kind = draw(st.sampled_from(kinds))
    dropped = draw(st.integers(0, 9)) == 0
    if kind == "text":
        ids = np.array(draw(st.lists(st.integers(5, 60), max_size=6)), dtype=np.int64)
        return Item("text", loss=draw(st.booleans()), dropped=dropped, ids=ids)
    stride = 14 if kind == "vit" else 16
    rows, cols = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    loss = kind == "vae" and draw(st.booleans())
    return Item(kind, loss=loss, dropped=dropped and not loss, image=0, height=rows * stride, width=cols * stride)


@st.composite
def samples(draw: st.DrawFn, max_samples: int = 4) -> list[Sample]:
    """A pack's samples: mixed, text only, images only, or without any generation token."""
    kinds = draw(st.sampled_from([("text", "vit", "vae"), ("text",), ("vae",), ("vit", "vae"), ("text", "vit")]))
    made = []
    for index in range(draw(st.integers(1, max_samples))):
        plan = tuple(draw(st.lists(items(kinds), min_size=1, max_size=5)))
        made.append(Sample("set", index, 0, plan))
    return made
