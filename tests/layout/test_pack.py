# SPDX-License-Identifier: Apache-2.0
"""A pack's fields equal the original's packed batch for the row made by hand (rows of files: tests/data/planner/test_golden_rows.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.pack import build_pack, grid_position_ids, sample_tokens
from tests.layout.golden_fields import GOLDEN_SPEC, assert_equal_to_golden
from tests.strategies import SPEC, samples


def text(*ids: int, loss: bool = False, **kw: object) -> Item:
    return Item("text", loss=loss, ids=np.array(ids, dtype=np.int64), **kw)


def vae(rows: int, cols: int, loss: bool = False, **kw: object) -> Item:
    return Item("vae", loss=loss, image=0, height=16 * rows, width=16 * cols, **kw)


def vit(rows: int, cols: int, **kw: object) -> Item:
    return Item("vit", image=0, height=14 * rows, width=14 * cols, **kw)


def interleaved_samples() -> list[Sample]:
    """The two hand-made samples behind ``packed_interleave.json``."""
    first = (
        text(64, 70, 75),
        vae(2, 3),
        vit(3, 4, special_token_label=411),
        text(259, 316, 405, 11, loss=True, special_token_label=419),
        vae(3, 3, loss=True, special_token_label=411),
        text(71, 72, loss=True),
    )
    second = (
        text(80, 81),
        vae(2, 2, loss=True, split_end=False, frame_delta=2),
        vae(2, 2, loss=True, split_start=False, split_end=False, frame_delta=2),
        vae(2, 2, loss=True, split_start=False),
        text(90, 91, 92, loss=True),
        vae(2, 2, split_end=False, frame_delta=3),
        vae(2, 2, split_start=False),
        text(93, loss=True),
    )
    return [Sample("set", 0, 0, first), Sample("set", 1, 0, second)]


def test_interleaved_row_equals_the_original(goldens: Path) -> None:
    golden = json.loads((goldens / "data" / "packed_interleave.json").read_text())
    assert_equal_to_golden(build_pack(interleaved_samples(), GOLDEN_SPEC), golden)


def test_frames_of_a_clip_share_a_timestep_draw() -> None:
    pack = build_pack(interleaved_samples(), GOLDEN_SPEC)
    noised = [image for image in pack.images if image.noised]
    assert [(image.sample, image.draw) for image in noised] == [(0, 0), (1, 0), (1, 0), (1, 0)]


@pytest.mark.parametrize("item", [vae(2, 2), vit(2, 2)])
def test_dropped_image_leaves_its_place_in_the_positions(item: Item) -> None:
    dropped = Item(**{**item.__dict__, "dropped": True})
    kept = build_pack([Sample("set", 0, 0, (item, text(7)))], SPEC)
    gone = build_pack([Sample("set", 0, 0, (dropped, text(7)))], SPEC)
    assert gone.position_ids.tolist() == kept.position_ids[-3:].tolist() == [1, 2, 3]


def test_dropped_text_leaves_nothing() -> None:
    gone = build_pack([Sample("set", 0, 0, (text(7, dropped=True), text(8)))], SPEC)
    assert gone.position_ids.tolist() == [0, 1, 2]


@settings(max_examples=60, deadline=None)
@given(samples())
def test_every_token_has_one_kind_and_one_place(plan: list[Sample]) -> None:
    pack = build_pack(plan, SPEC)
    places = np.concatenate([pack.text_positions, pack.vit_positions, pack.vae_positions])
    assert sorted(places.tolist()) == list(range(pack.sequence_length))
    assert pack.sequence_length == sum(sample_tokens(sample, SPEC) for sample in plan) == pack.split_lens.sum()
    assert pack.sequence_length == pack.sample_lens.sum() == len(pack.position_ids)
    assert set(pack.mse_positions) <= set(pack.vae_positions) and len(pack.labels) == len(pack.ce_positions)
    assert sum(image.tokens for image in pack.images) == len(pack.vit_positions) + len(pack.vae_positions)


def test_interpolated_ids_equal_the_original(goldens: Path) -> None:
    from safetensors.numpy import load_file

    tables = load_file(goldens / "data" / "image_tensors.safetensors")
    for name in ("pos_interp_14x980_p14_m70", "pos_interp_378x518_p14_m70", "pos_interp_980x658_p14_m70"):
        height, width = (int(part) for part in name.split("_")[2].split("x"))
        np.testing.assert_array_equal(grid_position_ids(height // 14, width // 14, 70, True), tables[name])


def test_an_item_without_content_is_refused() -> None:
    with pytest.raises(ValueError, match="token ids"):
        Item("text")
    with pytest.raises(ValueError, match="size in pixels"):
        Item("vae")
    with pytest.raises(ValueError, match="unknown"):
        Item("audio")
