# SPDX-License-Identifier: Apache-2.0
"""Attention of new tokens over what their context has cached: in generation it replaces a pack's mask.

One pass may serve many contexts at once (a batch of prompts, the three views of guidance). Linear layers see all new tokens together,
but attention runs per context. No context can see another, and results do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.kv_cache import LayerCache


@dataclass(frozen=True)
class NewTokens:
    """The number of new tokens of each expert that a context brings to a pass."""

    context: Context
    und: int
    gen: int = 0


def causal_mask(num_new: int, num_cached: int, device: torch.device) -> Tensor:
    """Return bool [num_new, num_cached + num_new], True where a query may look: all cached keys, itself and earlier new ones."""
    return torch.ones(num_new, num_cached + num_new, dtype=torch.bool, device=device).tril(diagonal=num_cached)


class CachedAttention:
    """The attention of one pass of the decoder; the order of tokens is [und of every row | gen of every row].

    ``causal`` masks new tokens among themselves (text); otherwise they see each other fully (images). ``keep`` extends the contexts,
    and ``caches_of`` then returns the new caches.
    """

    def __init__(self, rows: Sequence[NewTokens], causal: bool, keep: bool) -> None:
        self.rows = tuple(rows)
        self.causal = causal
        self.keep = keep
        self._new_caches: list[dict[int, LayerCache]] = [{} for _ in self.rows]
        # Slots of each row's tokens, computed in the first layer; a single row has all slots in order.
        self._slots: list[Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_number: int) -> Tensor:
        """Attend with q [s, heads, d], k and v [s, kv_heads, d] after RoPE; return [s, heads * d]. ``layer_number`` counts from 1."""
        if len(self.rows) == 1:
            return self._row(0, q, k, v, layer_number).flatten(1)
        if self._slots is None:
            self._slots = [slots.to(q.device) for slots in self._row_slots()]
        result = torch.empty_like(q)
        for number, slots in enumerate(self._slots):
            result[slots] = self._row(number, q[slots], k[slots], v[slots], layer_number)
        return result.flatten(1)

    def caches_of(self, row: int) -> dict[int, LayerCache]:
        """Return the layer caches of a row after the pass."""
        return self._new_caches[row]

    def _row_slots(self) -> list[Tensor]:
        """Return the slots of each row's tokens, und before gen."""
        slots, und, gen = [], 0, sum(row.und for row in self.rows)
        for row in self.rows:
            slots.append(torch.cat((torch.arange(und, und + row.und), torch.arange(gen, gen + row.gen))))
            und, gen = und + row.und, gen + row.gen
        return slots

    def _row(self, number: int, q: Tensor, k: Tensor, v: Tensor, layer_number: int) -> Tensor:
        """Compute one row's attention, [tokens, heads, d]."""
        cache = self.rows[number].context.caches.get(layer_number, LayerCache())
        if self.keep:
            cache = cache.append(k, v)
            self._new_caches[number][layer_number] = cache
            keys, values = cache.keys, cache.values
        else:
            keys, values = cache.extended(k, v)
        num_cached = len(keys) - len(q)
        # If the new tokens see all keys, no mask is needed. Without a cache torch's causal path is the fastest.
        needs_causal_mask = self.causal and len(q) > 1
        mask = causal_mask(len(q), num_cached, q.device) if needs_causal_mask and num_cached else None
        output = scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=needs_causal_mask and not num_cached,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return output[0].transpose(0, 1)
