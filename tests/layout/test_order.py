# SPDX-License-Identifier: Apache-2.0
"""Expert-sorted order is a permutation of a pack's tokens, understanding first; groups and blocks cover the mask exactly."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.layout.blocks import block_occupancy
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.layout.sdpa_batches import build_sdpa_batches
from tests.strategies import SPEC, samples


@settings(max_examples=50, deadline=None)
@given(samples(), st.integers(0, 9))
def test_order_is_a_permutation_with_understanding_first(plan: list[Sample], padding: int) -> None:
    pack = build_pack(plan, SPEC)
    order = expert_order(pack, length=pack.sequence_length + padding)
    assert sorted(order.positions.tolist()) == list(range(pack.sequence_length))
    np.testing.assert_array_equal(order.slots[order.positions], np.arange(pack.sequence_length))
    assert set(order.positions[order.n_und :]) == set(pack.vae_positions)
    assert order.length == pack.sequence_length + padding


@settings(max_examples=30, deadline=None)
@given(samples(), st.integers(1, 4))
def test_ranks_share_the_tokens(plan: list[Sample], ranks: int) -> None:
    pack = build_pack(plan, SPEC)
    orders = [expert_order(pack, keep=np.arange(pack.sequence_length) % ranks == rank) for rank in range(ranks)]
    held = np.concatenate([order.positions for order in orders])
    assert sorted(held.tolist()) == list(range(pack.sequence_length))


def test_too_many_tokens_are_refused() -> None:
    pack = build_pack([], SPEC)
    assert expert_order(pack).length == 0
    with pytest.raises(ValueError, match="max_num_tokens"):
        expert_order(build_pack([Sample("set", 0, 0, _text_items())], SPEC), length=1)


def _text_items():
    from megatron_bagel.layout.items import Item

    return (Item("text", ids=np.arange(4)),)


@settings(max_examples=50, deadline=None)
@given(samples(max_samples=6))
def test_groups_hold_every_pair_of_the_mask(plan: list[Sample]) -> None:
    pack = build_pack(plan, SPEC)
    mask, order = PackMask.of(pack), expert_order(pack)
    found = np.zeros((order.length, order.length), dtype=bool)
    for group in build_sdpa_batches(mask, order):
        assert group.mask.any(-1).all(), "an empty softmax row"
        for queries, keys, allowed in zip(group.queries, group.keys, group.mask, strict=True):
            rows, columns = len(np.unique(queries)), len(np.unique(keys))
            found[np.ix_(queries[:rows], keys[:columns])] |= allowed[:rows, :columns]
    np.testing.assert_array_equal(found, mask.allowed(order.positions, order.positions))


@settings(max_examples=50, deadline=None)
@given(samples(max_samples=6), st.sampled_from([4, 16]), st.integers(0, 20))
def test_block_occupancy_equals_the_oracle(plan: list[Sample], block: int, padding: int) -> None:
    pack = build_pack(plan, SPEC)
    mask, order = PackMask.of(pack), expert_order(pack, length=pack.sequence_length + padding)
    side = -(-order.length // block) * block
    dense = np.zeros((side, side), dtype=bool)
    real = len(order.positions)
    dense[:real, :real] = mask.allowed(order.positions, order.positions)
    blocks = dense.reshape(side // block, block, side // block, block)
    occupancy = block_occupancy(mask, order, block=block)
    np.testing.assert_array_equal(occupancy.occupied, blocks.any((1, 3)))
    np.testing.assert_array_equal(occupancy.full_blocks, blocks.all((1, 3)))


def test_block_occupancy_of_a_long_pack_holds_no_square_of_tokens() -> None:
    lens = np.full(328, 100)
    mask = PackMask(lens, lens, np.arange(328) % 3)
    places = np.arange(mask.length)
    order = TokenOrder(places, places, mask.length, places, places[:0], places[:0])
    tracemalloc.start()
    block_occupancy(mask, order)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < mask.length**2 / 16
