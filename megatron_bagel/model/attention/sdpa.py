# SPDX-License-Identifier: Apache-2.0
"""Attention with torch's ``scaled_dot_product_attention``, several documents per call: the backend of CPUs, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.sdpa_batches import build_sdpa_batches
from megatron_bagel.platform.device import to_device


class SdpaPlan:
    """Batches of documents of similar length: one SDPA call per batch, then one gather of the results."""

    def __init__(self, mask: PackMask, order: TokenOrder, device: torch.device | str = "cpu", keys: TokenOrder | None = None) -> None:
        batches = build_sdpa_batches(mask, order, keys)
        self.shapes = [batch.mask.shape for batch in batches]
        self.masks = [to_device(torch.from_numpy(batch.mask), device)[:, None] for batch in batches]

        def flat(slots: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([batch.reshape(-1) for batch in slots] or [np.zeros(0, dtype=np.int64)])

        queries = flat([batch.queries for batch in batches])
        # Padding repeats a document's first slot, so the result of a slot is at its first occurrence among the padded rows.
        row_of_slot = np.unique(queries, return_index=True)[1]
        self.queries, self.row_of_slot = (to_device(torch.from_numpy(slots), device) for slots in (queries, row_of_slot))
        self.keys = self.queries if keys is None else to_device(torch.from_numpy(flat([batch.keys for batch in batches])), device)
        # A single document needs no gather, because its slots are the rank's slots in order.
        self.single_document = keys is None and len(batches) == 1 and self.shapes[0][0] == 1

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """Compute attention as ``AttentionPlan.attend`` describes; every layer does the same."""
        if not self.shapes:
            # Without queries, keys and values stay in the graph so that their weights get (zero) gradients.
            return q.flatten(1) + (k.sum() + v.sum())
        if not self.single_document:
            q = q.index_select(0, self.queries)
            k, v = (x.index_select(0, self.keys) for x in (k, v))
        repeat, results = q.shape[1] // k.shape[1], []
        rows_per_batch = [self._slice_batches(x, side) for x, side in ((q, 1), (k, 2), (v, 2))]
        for (documents, _, _), mask, *parts in zip(self.shapes, self._masks_as(q.dtype), *rows_per_batch, strict=True):
            queries, keys, values = (x.unflatten(0, (documents, -1)).transpose(1, 2) for x in parts)
            if repeat > 1:
                keys, values = (x.repeat_interleave(repeat, 1) for x in (keys, values))
            result = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
            results.append(result.transpose(1, 2).flatten(2).flatten(0, 1))
        output = results[0] if len(results) == 1 else torch.cat(results)
        return output if self.single_document else output.index_select(0, self.row_of_slot)

    def _slice_batches(self, x: torch.Tensor, side: int) -> Sequence[torch.Tensor]:
        """Slice ``x`` into the rows of each batch; ``side`` is 1 for queries and 2 for keys and values."""
        return (x,) if len(self.shapes) == 1 else x.split([shape[0] * shape[side] for shape in self.shapes])

    def _masks_as(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return additive masks in the queries' dtype, converted once; torch would convert boolean masks in every call."""
        if self.masks and self.masks[0].dtype != dtype:
            minus_infinity = torch.tensor(float("-inf"), dtype=dtype, device=self.masks[0].device)
            self.masks = [torch.where(mask, 0.0, minus_infinity).to(dtype) for mask in self.masks]
        return self.masks
