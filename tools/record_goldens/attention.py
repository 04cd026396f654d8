# SPDX-License-Identifier: Apache-2.0
"""Attention that runs on a CPU in the place of the kernels that the original calls: plain softmax in the type of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class WholeMask:
    """A mask as a matrix: ``allowed`` [queries, keys] says which keys a query sees."""

    allowed: Tensor


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Return attention over ``[..., tokens, head_dim]``, scaled by the root of ``head_dim``; ``allowed`` None means every key."""
    scores = (query @ key.transpose(-2, -1)) / math.sqrt(query.shape[-1])
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ value


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    **unused: Any,
) -> Tensor:
    """Stand in for ``flash_attn_varlen_func``: sequences end to end, ``[tokens, heads, head_dim]``.

    A causal query sees the keys up to its own place counted from the end, as in flash-attn. Key heads are repeated for query heads.
    """
    shared = q.shape[1] // k.shape[1]
    outputs = []
    query_ends, key_ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for index in range(len(query_ends) - 1):
        queries, keys = slice(*query_ends[index : index + 2]), slice(*key_ends[index : index + 2])
        query = q[queries].transpose(0, 1)
        key, value = (part[keys].repeat_interleave(shared, dim=1).transpose(0, 1) for part in (k, v))
        allowed = None
        if causal:
            rows, columns = query.shape[1], key.shape[1]
            allowed = torch.arange(columns)[None, :] <= torch.arange(rows)[:, None] + (columns - rows)
        outputs.append(softmax_attention(query, key, value, allowed).transpose(0, 1))
    return torch.cat(outputs)


def whole_mask(mask_mod: Callable[..., Tensor], B: int, H: int, Q_LEN: int, KV_LEN: int, device: object = None, **unused: Any) -> WholeMask:
    """Stand in for ``create_block_mask``: ask the rule for every pair of a query and a key."""
    first = torch.zeros((), dtype=torch.long)
    queries, keys = torch.meshgrid(torch.arange(Q_LEN), torch.arange(KV_LEN), indexing="ij")
    return WholeMask(mask_mod(first, first, queries, keys))


def masked_attention(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool = False, block_mask: WholeMask | None = None) -> Tensor:
    """Stand in for ``flex_attention`` over ``[1, heads, tokens, head_dim]`` with a ``WholeMask``."""
    shared = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
    return softmax_attention(query, key, value, None if block_mask is None else block_mask.allowed)
