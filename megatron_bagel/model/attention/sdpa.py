"""Attention by torch's scaled_dot_product_attention, a few documents at a time: the backend of CPUs, and the fallback."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder
from megatron_bagel.layout.sdpa_batches import attention_groups


class SdpaPlan:
    """Documents of similar length are gathered into batches; one SDPA call each, one gather back."""

    def __init__(self, mask: PackMask, order: TokenOrder, device: torch.device | str = "cpu", keys: TokenOrder | None = None) -> None:
        groups = attention_groups(mask, order, keys)
        self.shapes = [group.mask.shape for group in groups]
        self.masks = [torch.from_numpy(group.mask).to(device)[:, None] for group in groups]

        def flat(slots: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([group.reshape(-1) for group in slots] or [np.zeros(0, dtype=np.int64)])

        queries = flat([group.queries for group in groups])
        # Where each slot's result lies among the padded rows: its first occurrence, for padding repeats a document's first slot.
        back = np.unique(queries, return_index=True)[1]
        self.queries, self.back = torch.from_numpy(queries).to(device), torch.from_numpy(back).to(device)
        self.keys = self.queries if keys is None else torch.from_numpy(flat([group.keys for group in groups])).to(device)
        # A single document needs no gather: its slots are the rank's slots, in order.
        self.in_place = keys is None and len(groups) == 1 and self.shapes[0][0] == 1

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer_number: int) -> torch.Tensor:
        """See AttentionPlan; the same in every layer."""
        if not self.shapes:
            # Nothing to attend; keys and values stay in the graph, so that their weights get (zero) gradients.
            return q.flatten(1) + (k.sum() + v.sum())
        if not self.in_place:
            q = q.index_select(0, self.queries)
            k, v = (x.index_select(0, self.keys) for x in (k, v))
        repeat, results = q.shape[1] // k.shape[1], []
        cut = [self._cut(x, side) for x, side in ((q, 1), (k, 2), (v, 2))]
        for (documents, _, _), mask, *parts in zip(self.shapes, self._masks_as(q.dtype), *cut, strict=True):
            batch = [x.unflatten(0, (documents, -1)).transpose(1, 2) for x in parts]
            if repeat > 1:
                batch[1:] = [x.repeat_interleave(repeat, 1) for x in batch[1:]]
            result = F.scaled_dot_product_attention(*batch, attn_mask=mask)
            results.append(result.transpose(1, 2).flatten(2).flatten(0, 1))
        out = results[0] if len(results) == 1 else torch.cat(results)
        return out if self.in_place else out.index_select(0, self.back)

    def _cut(self, x: torch.Tensor, side: int) -> Sequence[torch.Tensor]:
        """The rows of each group; ``side`` 1 for queries, 2 for keys and values."""
        return (x,) if len(self.shapes) == 1 else x.split([shape[0] * shape[side] for shape in self.shapes])

    def _masks_as(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Additive masks of the queries' dtype, made once: torch would make them from booleans in every call."""
        if self.masks and self.masks[0].dtype != dtype:
            minus_infinity = torch.tensor(float("-inf"), dtype=dtype, device=self.masks[0].device)
            self.masks = [torch.where(mask, 0.0, minus_infinity).to(dtype) for mask in self.masks]
        return self.masks
