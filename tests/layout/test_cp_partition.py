# SPDX-License-Identifier: Apache-2.0
"""Dealing gives every context-parallel rank as many tokens and as much attention work as the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.long_packs import KINDS, LONG, TOKENS
from megatron_bagel.layout.blocks import block_occupancy
from megatron_bagel.layout.cp_partition import assign_tokens, concatenated, context_orders, imbalance, padded_length
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import Pack, build_pack
from megatron_bagel.layout.sdpa_batches import build_sdpa_batches
from tests.strategies import SPEC, samples


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def plan(request: pytest.FixtureRequest) -> list[Sample]:
    return request.param()


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_long_packs_are_even(plan: list[Sample], ranks: int) -> None:
    pack = build_pack(plan, LONG)
    assert pack.sequence_length == TOKENS
    orders, areas = context_orders(pack, ranks), PackMask.of(pack).row_areas()
    counts = [len(order.positions) for order in orders]
    assert max(counts) - min(counts) <= 1
    loads = np.array([areas[order.positions].sum() for order in orders])
    assert loads.max() / loads.mean() <= 1.05


def _dense_blocks(pack: Pack, queries: np.ndarray, keys: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(some, full) of every block by evaluating the mask, one row of blocks at a time."""
    mask, some, full = PackMask.of(pack), [], []
    starts = np.arange(0, len(keys), block)
    for first in range(0, len(queries), block):
        allowed = mask.allowed(queries[first : first + block], keys)
        # Up to 128 rows: a byte is enough for their sum, and many times quicker.
        pairs = np.add.reduceat(allowed.view(np.uint8).sum(0, dtype=np.uint8), starts, dtype=np.int64)
        some.append(pairs > 0)
        full.append(pairs == block * block)
    return np.array(some), np.array(full)


@pytest.mark.parametrize(
    "plan", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:3])], ids=lambda kind: kind.__name__, indirect=True
)
def test_block_masks_of_long_packs_equal_the_oracle(plan: list[Sample]) -> None:
    """128 x 128 blocks: all of one rank alone, and a rank's queries against the keys of sixteen."""
    pack = build_pack(plan, LONG)
    mask, whole, orders = PackMask.of(pack), expert_order(pack), context_orders(pack, 16)
    keys = concatenated(orders)
    for queries, asked in ((whole, whole), (orders[1], keys)):
        found = block_occupancy(mask, queries, asked)
        some, full = _dense_blocks(pack, queries.positions, asked.positions, 128)
        np.testing.assert_array_equal(found.occupied, some)
        np.testing.assert_array_equal(found.full_blocks, full)


@settings(max_examples=60, deadline=None)
@given(samples(max_samples=6), st.integers(1, 16), st.integers(1, 4))
def test_orders_of_all_ranks_are_the_pack(plan: list[Sample], ranks: int, multiple: int) -> None:
    pack = build_pack(plan, SPEC)
    orders = context_orders(pack, ranks, multiple=multiple)
    counts = [len(order.positions) for order in orders]
    assert len(orders) == ranks and max(counts) - min(counts) <= 1
    assert {order.length for order in orders} == {padded_length(pack.sequence_length, ranks, multiple)}
    assert orders[0].length % multiple == 0 and orders[0].length - max(counts) < multiple
    together = concatenated(orders)
    assert sorted(together.positions.tolist()) == list(range(pack.sequence_length))
    np.testing.assert_array_equal(together.slots[together.positions], np.arange(pack.sequence_length))
    assert sorted(together.vae_rows.tolist()) == list(range(len(pack.vae_positions)))


@settings(max_examples=60, deadline=None)
@given(samples(max_samples=6), st.integers(2, 5))
def test_groups_and_blocks_of_a_rank_hold_its_part_of_the_mask(plan: list[Sample], ranks: int) -> None:
    pack = build_pack(plan, SPEC)
    mask, orders = PackMask.of(pack), context_orders(pack, ranks)
    keys = concatenated(orders)
    for order in orders:
        oracle = mask.allowed(order.positions, keys.positions)
        found = np.zeros_like(oracle)
        for group in build_sdpa_batches(mask, order, keys):
            for queries, columns, allowed in zip(group.queries, group.keys, group.mask, strict=True):
                real = len(np.unique(queries)), len(np.unique(columns))
                found[np.ix_(queries[: real[0]], columns[: real[1]])] |= allowed[: real[0], : real[1]]
        np.testing.assert_array_equal(found, oracle)
        occupancy = block_occupancy(mask, order, keys, block=4)
        if not len(order.positions):
            continue
        some, full = _dense_blocks(pack, order.positions, keys.positions, 4)
        np.testing.assert_array_equal(occupancy.occupied[: len(some)], some)
        np.testing.assert_array_equal(occupancy.full_blocks[: len(full)], full)
        assert not occupancy.occupied[len(some) :].any()


def test_small_packs_are_dealt_as_evenly_as_they_allow() -> None:
    assert imbalance(np.arange(64.0), assign_tokens(np.arange(64.0), 4), 4) < 1.01
    assert sorted(assign_tokens(np.ones(3), 5).tolist()) == [0, 1, 2]
    assert len(assign_tokens(np.zeros(0), 4)) == 0
    with pytest.raises(ValueError, match="context-parallel-size"):
        assign_tokens(np.ones(3), 0)
