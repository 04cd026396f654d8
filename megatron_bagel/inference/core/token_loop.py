# SPDX-License-Identifier: Apache-2.0
"""Writes text for a batch of contexts with tensors of fixed shapes, which a GPU can replay as one graph.

The way of ``Engine.next_logits`` grows a cache per context, attends context by context, and launches every operation from the host; on
a GPU the host is then the limit. Here the keys and values of all contexts lie in one table per layer with room for the whole text, a
mask tells each context how much of its row is filled, and lengths and positions are counted on the device. Every token takes the same
operations on the same memory: on a GPU they are captured once and replayed, if the model allows it (``capture.py``). Rows whose text
has ended go on; nobody looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_bagel.inference.core.capture import WARM_UP, launched_because
from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.engine import Engine


class TokenLoop(Protocol):
    """Reads one token into every context and predicts the next."""

    def logits(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read ``tokens`` into the contexts ``rows`` and return the logits of their next tokens, [rows, V]."""


class GrowingLoop:
    """One cache per context, which grows. A context that is left out takes no part any more."""

    def __init__(self, engine: Engine, contexts: Sequence[Context]) -> None:
        self._engine, self._contexts = engine, dict(enumerate(contexts))

    def logits(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read and predict as ``TokenLoop.logits`` says."""
        logits, extended = self._engine.next_logits([self._contexts[row] for row in rows], tokens)
        self._contexts = dict(zip(rows, extended, strict=True))
        return logits


class StaticAttention:
    """Attention of one new token per context over tables [contexts, capacity, kv_heads, head_dim] of keys and values per layer."""

    def __init__(self, contexts: Sequence[Context], capacity: int, device: torch.device) -> None:
        self._contexts, self._capacity = contexts, capacity
        self.lengths = torch.tensor([context.length for context in contexts], device=device)
        self._rows, self._slots = torch.arange(len(contexts), device=device), torch.arange(capacity, device=device)
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer_number: int) -> Tensor:
        """Attend with q [contexts, heads, d], k and v [contexts, kv_heads, d] after RoPE; return [contexts, heads * d]."""
        keys, values = self._table(layer_number, k)
        keys[self._rows, self.lengths], values[self._rows, self.lengths] = k, v
        visible = self._slots[None, :] <= self.lengths[:, None]
        # There is one query per head, so heads that share keys are rows of one product. As heads of their own they would make torch copy
        # the tables for each: of its kernels that take a mask, not all share keys among heads.
        grouped = q.unflatten(1, (k.shape[1], -1))
        output = scaled_dot_product_attention(grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible[:, None, None])
        return output.flatten(1)

    def _table(self, layer_number: int, example: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tables of a layer, with what the contexts have cached. Free slots are zero, because a mask does not stop NaN."""
        if layer_number not in self._tables:
            shape = len(self._contexts), self._capacity, *example.shape[1:]
            keys, values = example.new_zeros(shape), example.new_zeros(shape)
            for row, context in enumerate(self._contexts):
                if (cache := context.caches.get(layer_number)) is not None:
                    keys[row, : cache.length], values[row, : cache.length] = cache.keys, cache.values
            self._tables[layer_number] = keys, values
        return self._tables[layer_number]


class StaticLoop:
    """All contexts in every pass, in memory that stays where it is; on a GPU as one graph."""

    def __init__(self, engine: Engine, contexts: Sequence[Context], tokens: int) -> None:
        """Make room for up to ``tokens`` more tokens of each context."""
        device = engine.device
        self._engine = engine
        self._attention = StaticAttention(contexts, max(context.length for context in contexts) + tokens, device)
        self._ids = torch.zeros(len(contexts), dtype=torch.long, device=device)
        self._positions = torch.tensor([context.position for context in contexts], device=device)
        self._captured = launched_because(engine) is None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)
        self._host_ids = [0] * len(contexts)

    def logits(self, rows: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Read and predict as ``TokenLoop.logits`` says."""
        for row, token in zip(rows, tokens, strict=True):
            self._host_ids[row] = token
        self._ids.copy_(torch.tensor(self._host_ids))
        if self._captured:
            self._replay()
        else:
            self._pass()
        return self._logits[list(rows)]

    def _pass(self) -> None:
        """Read ``_ids`` and leave the predictions in ``_logits``."""
        decoder = self._engine.decoder
        hidden = decoder.run_decoder(decoder.embed_text(self._ids), len(self._ids), self._positions, self._attention)
        self._logits = decoder.all_text_logits(hidden)
        self._attention.lengths += 1
        self._positions += 1

    def _replay(self) -> None:
        """Run the pass as a graph, which the first call captures. Warm-up passes are counted back, so the next one overwrites them."""
        if self._graph is None:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._pass()
                    self._attention.lengths -= 1
                    self._positions -= 1
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._pass()
        self._graph.replay()
