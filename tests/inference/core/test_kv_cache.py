# SPDX-License-Identifier: Apache-2.0
"""Caches are values: whatever is appended to whichever snapshot, every snapshot keeps exactly what it had."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.inference.core.kv_cache import LayerCache


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1, max_size=20))
def test_snapshots_share_storage_but_not_fate(steps: list[tuple[int, int]]) -> None:
    snapshots: list[tuple[LayerCache, torch.Tensor]] = [(LayerCache(), torch.zeros(0, 2, 3))]
    for number, (which, tokens) in enumerate(steps):
        cache, expected = snapshots[which % len(snapshots)]
        new = torch.full((tokens, 2, 3), float(number + 1))
        snapshots.append((cache.append(new, -new), torch.cat((expected, new))))
    for cache, expected in snapshots[1:]:
        assert torch.equal(cache.keys, expected) and torch.equal(cache.values, -expected)


def test_extended_leaves_the_cache_alone() -> None:
    ones = torch.ones(2, 1, 1)
    cache = LayerCache().append(ones, ones)
    keys, _ = cache.extended(2 * ones, ones)
    assert keys.flatten().tolist() == [1, 1, 2, 2] and cache.length == 2
    assert LayerCache().extended(ones, ones)[0] is ones
