# SPDX-License-Identifier: Apache-2.0
"""The rectangles hold every visible pair of the mask once and no other, in any order of slots, and are few."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.long_packs import KINDS, LONG
from megatron_bagel.layout.cp_partition import concatenated, context_orders
from megatron_bagel.layout.items import Item, Mode, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.layout.rectangles import Rectangles, Shape, mask_rectangles
from tests.magi_stand_in import drawn
from tests.strategies import SPEC, samples


def order_of(positions: np.ndarray) -> TokenOrder:
    slots = np.empty_like(positions)
    slots[positions] = np.arange(len(positions))
    return TokenOrder(positions, slots, len(positions), positions, positions, positions)


def assert_equal(rectangles: Rectangles, mask: PackMask, queries: TokenOrder, keys: TokenOrder) -> None:
    assert {array.dtype for array in vars(rectangles).values()} == {np.dtype(np.int32)}
    counts = drawn(rectangles.queries, rectangles.keys, rectangles.shapes, (queries.length, keys.length))
    visible = np.zeros_like(counts)
    visible[: len(queries.positions), : len(keys.positions)] = mask.allowed(queries.positions, keys.positions)
    np.testing.assert_array_equal(counts, visible)


@settings(max_examples=150, deadline=None)
@given(samples(max_samples=6), st.integers(0, 9))
def test_expert_sorted_slots(plan: list[Sample], padding: int) -> None:
    pack = build_pack(plan, SPEC)
    mask, order = PackMask.of(pack), expert_order(pack, length=pack.sequence_length + padding)
    rectangles = mask_rectangles(mask, order)
    assert_equal(rectangles, mask, order, order)
    causal = mask.split_modes == Mode.CAUSAL
    assert len(rectangles.shapes) <= 4 * causal.sum() + 6 * (~causal).sum()


@settings(max_examples=60, deadline=None)
@given(samples(max_samples=6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_context_parallel_shares(plan: list[Sample], ranks: int, seed: int) -> None:
    """The shares of training, and random ones, whose runs have gaps everywhere."""
    pack = build_pack(plan, SPEC)
    mask, owners = PackMask.of(pack), np.random.default_rng(seed).integers(0, ranks, pack.sequence_length)
    for orders in (context_orders(pack, ranks), [expert_order(pack, owners == rank) for rank in range(ranks)]):
        keys = concatenated(orders)
        assert_equal(mask_rectangles(mask, keys), mask, keys, keys)
        for order in orders:
            assert_equal(mask_rectangles(mask, order, keys), mask, order, keys)


@settings(max_examples=60, deadline=None)
@given(samples(), st.integers(0, 2**32 - 1))
def test_any_order_of_slots(plan: list[Sample], seed: int) -> None:
    pack = build_pack(plan, SPEC)
    mask, shuffled = PackMask.of(pack), np.random.default_rng(seed).permutation(pack.sequence_length)
    for order in (order_of(np.arange(pack.sequence_length)), order_of(shuffled)):
        assert_equal(mask_rectangles(mask, order), mask, order, order)


def test_a_text_is_one_triangle_and_a_picture_from_text_has_two_rectangles_more() -> None:
    text, noise = Item("text", ids=np.arange(5, 25)), Item("vae", loss=True, image=0, height=64, width=64)
    pack = build_pack([Sample("set", 0, 0, (text,))], SPEC)
    assert mask_rectangles(PackMask.of(pack), expert_order(pack)).shapes.tolist() == [Shape.CAUSAL]
    pack = build_pack([Sample("set", 0, 0, (text, noise))], SPEC)
    assert mask_rectangles(PackMask.of(pack), expert_order(pack)).shapes.tolist() == [Shape.FULL, Shape.FULL, Shape.CAUSAL]
    assert mask_rectangles(PackMask.of(pack), order_of(np.arange(pack.sequence_length))).shapes.tolist() == [Shape.FULL, Shape.CAUSAL]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_areas_of_long_packs_add_up(kind: Callable[[], list[Sample]]) -> None:
    """A dense matrix of 32k tokens would be too large; the area of the rectangles is that of the mask."""
    pack = build_pack(kind(), LONG)
    mask = PackMask.of(pack)
    rectangles = mask_rectangles(mask, expert_order(pack))
    rows, columns = (np.diff(sides.astype(np.int64))[:, 0] for sides in (rectangles.queries, rectangles.keys))
    assert (rows == columns)[rectangles.shapes != Shape.FULL].all()
    assert np.where(rectangles.shapes == Shape.FULL, rows * columns, rows * (rows + 1) // 2).sum() == mask.area()
