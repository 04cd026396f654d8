"""Attention of new tokens over what their context has cached; the counterpart at generation time of a pack's mask.

One pass may serve many contexts at once (a batch of prompts, the three views of guidance): linear layers see all new
tokens together, attention is done per context, so no context can see another and results do not depend on the batch.
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
    """How many new tokens of each expert a context brings to a pass."""

    context: Context
    und: int
    gen: int = 0


def causal_mask(new: int, cached: int, device: torch.device) -> Tensor:
    """Bool [new, cached + new], True where a query may look: everything cached, and itself and earlier among the new."""
    return torch.ones(new, cached + new, dtype=torch.bool, device=device).tril(diagonal=cached)


class CachedAttention:
    """The attention of one pass of the decoder; tokens lie as [und of every row | gen of every row].

    ``causal`` masks new tokens among themselves (text); otherwise they see each other fully (images). ``keep`` says
    whether the pass extends the contexts; the new caches are then read with ``caches_of``.
    """

    def __init__(self, rows: Sequence[NewTokens], causal: bool, keep: bool) -> None:
        self.rows = tuple(rows)
        self.causal = causal
        self.keep = keep
        self._kept: list[dict[int, LayerCache]] = [{} for _ in self.rows]
        # Slots of each row's tokens, found in the first layer; the only row of a pass has all slots in order.
        self._slots: list[Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_number: int) -> Tensor:
        """q [s, heads, d], k and v [s, kv_heads, d] after RoPE -> [s, heads * d]; ``layer_number`` counts from 1."""
        if len(self.rows) == 1:
            return self._row(0, q, k, v, layer_number).flatten(1)
        if self._slots is None:
            self._slots = [slots.to(q.device) for slots in self._row_slots()]
        result = torch.empty_like(q)
        for number, slots in enumerate(self._slots):
            result[slots] = self._row(number, q[slots], k[slots], v[slots], layer_number)
        return result.flatten(1)

    def caches_of(self, row: int) -> dict[int, LayerCache]:
        """Layer caches of a row after the pass."""
        return self._kept[row]

    def _row_slots(self) -> list[Tensor]:
        """Slots of each row's tokens, und before gen."""
        slots, und, gen = [], 0, sum(row.und for row in self.rows)
        for row in self.rows:
            slots.append(torch.cat((torch.arange(und, und + row.und), torch.arange(gen, gen + row.gen))))
            und, gen = und + row.und, gen + row.gen
        return slots

    def _row(self, number: int, q: Tensor, k: Tensor, v: Tensor, layer_number: int) -> Tensor:
        """One row's attention, [tokens, heads, d]."""
        cache = self.rows[number].context.caches.get(layer_number, LayerCache())
        if self.keep:
            cache = cache.append(k, v)
            self._kept[number][layer_number] = cache
            keys, values = cache.keys, cache.values
        else:
            keys, values = cache.extended(k, v)
        cached = len(keys) - len(q)
        # Where the new tokens see all keys no mask is needed; without a cache torch's own causal path is the cheapest.
        square = self.causal and len(q) > 1
        mask = causal_mask(len(q), cached, q.device) if square and cached else None
        out = scaled_dot_product_attention(
            q.transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            is_causal=square and not cached,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[0].transpose(0, 1)
