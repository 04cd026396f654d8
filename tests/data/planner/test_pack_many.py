# SPDX-License-Identifier: Apache-2.0
"""A block of packs: never too full, no sample twice, as full and as even as the samples allow."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.data.planner.pack_many import BlockPacking, Load, closing_pair
from megatron_bagel.data.planner.packing import best_pair

SAMPLES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 30)), max_size=40)


@given(SAMPLES, st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(0, 40), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_nothing_overflows_and_what_waits_fits_nowhere(samples: list[tuple[int, int]], begun: list[int], due: int, first: int) -> None:
    tokens, excess = np.array(samples, dtype=np.int64).reshape(-1, 2).T
    packing = BlockPacking(Load(tokens, excess), Load(np.array(begun), np.zeros(len(begun), dtype=np.int64)), 100)
    packing.assign_first(np.arange(min(first, len(tokens))))
    packing.assign_due(np.arange(min(due, len(tokens))))
    packing.close()
    pack_of = packing.pack_of
    used = np.array(begun) + np.bincount(pack_of[pack_of >= 0], tokens[pack_of >= 0], len(begun))
    assert used.max() <= 100
    waiting = tokens[pack_of < 0]
    assert not len(waiting) or used.min() + waiting.min() > 100


def test_many_packs_are_even_in_tokens_and_work() -> None:
    rng = np.random.default_rng(0)
    tokens = np.clip(np.exp(rng.normal(6.5, 1.0, 2400)), 20, 8192).astype(np.int64)
    excess = (3.1e-5 * tokens.astype(float) ** 2).astype(np.int64)
    nothing = np.zeros(64, dtype=np.int64)
    packing = BlockPacking(Load(tokens, excess), Load(nothing, nothing), 36864)
    packing.assign_due(np.arange(int(np.searchsorted(np.cumsum(tokens), 64 * 32768))))
    packing.close()
    taken = packing.pack_of >= 0
    used, cost = (np.bincount(packing.pack_of[taken], weight[taken], 64) for weight in (tokens, tokens + excess))
    assert used.mean() / 36864 > 0.998 and used.max() / used.mean() < 1.005
    assert cost.max() / cost.mean() < 1.015


@given(st.lists(st.integers(5, 60), min_size=1, max_size=40).map(sorted), st.integers(0, 130))
def test_the_closing_pair_is_as_good_as_the_best(sizes: list[int], room: int) -> None:
    fitting = [size for size in sizes if size <= room]
    if not fitting:
        return
    pair = closing_pair(sizes, room, room - fitting[-1]) or [len(fitting) - 1]
    assert sorted(set(pair), reverse=True) == pair  # taken out in this order, no place moves
    assert sum(sizes[place] for place in pair) == sum(fitting[place] for place in best_pair(np.array(fitting), room))
