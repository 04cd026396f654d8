"""Dealing gives every context-parallel rank as many tokens and as much attention work as the others, quickly."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.layout.blocks import block_occupancy
from megatron_bagel.layout.dealing import concatenated, context_orders, deal, imbalance, padded_length
from megatron_bagel.layout.groups import attention_groups
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import LayoutSpec, Pack, build_pack
from tests.strategies import SPEC, samples

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


def _quickest(make: Callable[[], object], tries: int = 5) -> float:
    """Processor seconds of the fastest try: other processes of the machine do not count."""
    spent = []
    for _ in range(tries):
        start = time.process_time()
        make()
        spent.append(time.process_time() - start)
    return min(spent)


@pytest.mark.parametrize("ranks", [2, 16])
def test_layout_of_a_long_pack_is_quick(plan: list[Sample], ranks: int) -> None:
    """From samples to every rank's order."""
    assert _quickest(lambda: context_orders(build_pack(plan, LONG), ranks)) < 0.05


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


def test_block_masks_of_long_packs_equal_the_oracle_and_are_quick(plan: list[Sample]) -> None:
    """128 x 128 blocks: all of one rank alone, and a rank's queries against the keys of sixteen."""
    pack = build_pack(plan, LONG)
    mask, whole, orders = PackMask.of(pack), expert_order(pack), context_orders(pack, 16)
    keys = concatenated(orders)
    for queries, asked in ((whole, whole), (orders[1], keys)):
        found = block_occupancy(mask, queries, asked)
        some, full = _dense_blocks(pack, queries.positions, asked.positions, 128)
        np.testing.assert_array_equal(found.some, some)
        np.testing.assert_array_equal(found.full, full)
        assert _quickest(lambda queries=queries, asked=asked: block_occupancy(mask, queries, asked), tries=2) < 0.3


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
        for group in attention_groups(mask, order, keys):
            for queries, columns, allowed in zip(group.queries, group.keys, group.mask, strict=True):
                real = len(np.unique(queries)), len(np.unique(columns))
                found[np.ix_(queries[: real[0]], columns[: real[1]])] |= allowed[: real[0], : real[1]]
        np.testing.assert_array_equal(found, oracle)
        occupancy = block_occupancy(mask, order, keys, block=4)
        if not len(order.positions):
            continue
        some, full = _dense_blocks(pack, order.positions, keys.positions, 4)
        np.testing.assert_array_equal(occupancy.some[: len(some)], some)
        np.testing.assert_array_equal(occupancy.full[: len(full)], full)
        assert not occupancy.some[len(some) :].any()


def test_small_packs_are_dealt_as_evenly_as_they_allow() -> None:
    assert imbalance(np.arange(64.0), deal(np.arange(64.0), 4), 4) < 1.01
    assert sorted(deal(np.ones(3), 5).tolist()) == [0, 1, 2]
    assert len(deal(np.zeros(0), 4)) == 0
    with pytest.raises(ValueError, match="context-parallel-size"):
        deal(np.ones(3), 0)
