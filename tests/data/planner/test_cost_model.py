# SPDX-License-Identifier: Apache-2.0
"""What the planner counts equals what the layout makes: lengths, mask areas; and the cost ratios have the right size."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.data.planner.cost_model import COST_UNIT, CostModel
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import LayoutSpec, build_pack
from tests.data.planner.measured_sample import mask_area, measure_sample

SPEC = LayoutSpec(bos=1, eos=2, start_of_image=3, end_of_image=4, vit_max_side=8, max_latent_size=8)
FLAG, SIDE = st.booleans(), st.integers(1, 3)
TEXT = st.builds(lambda n, loss, dropped: Item("text", loss=loss, dropped=dropped, ids=np.arange(n)), st.integers(0, 9), FLAG, FLAG)
VIT = st.builds(lambda r, c, dropped: Item("vit", image=0, height=14 * r, width=14 * c, dropped=dropped), SIDE, SIDE, FLAG)
VAE = st.builds(
    lambda r, c, loss, dropped: Item("vae", image=0, height=16 * r, width=16 * c, loss=loss, dropped=dropped and not loss),
    SIDE, SIDE, FLAG, FLAG,
)  # fmt: skip
CLIP = st.builds(
    lambda n, loss: [
        Item("vae", image=i, height=16, width=32, loss=loss, split_start=i == 0, split_end=i == n - 1, frame_delta=2) for i in range(n)
    ],
    SIDE,
    FLAG,
)
PARTS = st.lists(st.one_of(CLIP, *(kind.map(lambda item: [item]) for kind in (TEXT, VIT, VAE))), max_size=6)
ITEMS = PARTS.map(lambda parts: [item for part in parts for item in part])


@given(ITEMS)
@settings(max_examples=150, deadline=None)
def test_counts_equal_the_layout(items: list[Item]) -> None:
    sample = Sample("unified_edit/x", 0, 0, tuple(items))
    pack = build_pack([sample], SPEC)
    tokens, full, cost = measure_sample(sample, SPEC, CostModel(pair=1.0, vit_token=0.0, vae_token=0.0))
    assert tokens == pack.sequence_length <= full
    area = PackMask.of(pack).area()
    assert mask_area(items, SPEC) == area
    assert cost == (tokens + area) * COST_UNIT
    if not any(item.dropped for item in items):
        assert tokens == full


def test_released_model_has_the_default_ratios() -> None:
    llm = LLMArch(3584, 18944, 28, 28, 4, 152064)
    vit = ViTArch(1152, 4304, 27, 16, image_size=980)
    costs, default = CostModel.of(BagelArch(llm, vit, AutoencoderArch(), max_latent_size=64)), CostModel()
    for name in ("pair", "vit_token", "vae_token"):
        assert 0.8 < getattr(costs, name) / getattr(default, name) < 1.25, name
