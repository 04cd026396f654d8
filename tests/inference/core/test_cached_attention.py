# SPDX-License-Identifier: Apache-2.0
"""Attention over a cache equals attention over everything at once, and a batch equals its rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.inference.core.cached_attention import CachedAttention, NewTokens, causal_mask
from megatron_bagel.inference.core.context import Context

HEADS, KV_HEADS, DIM = 4, 2, 8


def draw(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, heads, DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS))


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 99))
def test_text_in_pieces_equals_text_at_once(pieces: list[int], seed: int) -> None:
    q, k, v = draw(sum(pieces), seed)
    whole = dense(q, k, v, causal_mask(len(q), 0, q.device))
    context, start = Context(), 0
    for tokens in pieces:
        attention = CachedAttention([NewTokens(context, tokens)], causal=True, keep=True)
        rows = slice(start, start + tokens)
        torch.testing.assert_close(attention.attend(q[rows], k[rows], v[rows], 1), whole[rows], atol=1e-5, rtol=1e-5)
        context, start = context.advanced(attention.caches_of(0), tokens, tokens), start + tokens
    assert context.caches[1].length == sum(pieces) == context.length


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    past = draw(3, 1)
    prefilled = CachedAttention([NewTokens(Context(), 3)], causal=True, keep=True)
    prefilled.attend(*past, 1)
    with_past = Context().advanced(prefilled.caches_of(0), 3, 3)
    rows = [NewTokens(with_past, 2, 4), NewTokens(Context(), 2, 1)]
    q, k, v = draw(9, 2)
    together = CachedAttention(rows, causal=False, keep=False).attend(q, k, v, 1)
    # Slots are [und of both rows | gen of both rows].
    for row, slots in zip(rows, ([0, 1, 4, 5, 6, 7], [2, 3, 8]), strict=True):
        alone = CachedAttention([row], causal=False, keep=False).attend(q[slots], k[slots], v[slots], 1)
        torch.testing.assert_close(together[slots], alone, atol=1e-6, rtol=1e-6)
    assert with_past.caches[1].length == 3
