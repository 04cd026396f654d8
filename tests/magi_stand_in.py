# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the package magi_attention: its kernel's contract in plain torch, for machines without the package or a Hopper GPU.

It takes the same arguments and draws the same pairs, a pair as often as rectangles hold it, and it saves for the backward pass what
the kernel saves. It also takes fp32, on a CPU.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch


def drawn(q_ranges: np.ndarray, k_ranges: np.ndarray, shapes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How often each pair is in a rectangle, int [queries, keys]. Causal ends in the lower right corner, inverse starts upper left."""
    counts = np.zeros(size, dtype=np.int64)
    for (a, b), (c, d), shape in zip(q_ranges.tolist(), k_ranges.tolist(), shapes.tolist(), strict=True):
        assert 0 <= a < b <= size[0] and 0 <= c < d <= size[1] and shape in (0, 1, 2, 3)
        part = np.ones((b - a, d - c), dtype=np.int64)
        if shape in (1, 3):
            part = np.tril(part, (d - c) - (b - a))
        if shape in (2, 3):
            part = np.triu(part)
        counts[a:b, c:d] += part
    return counts


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logarithms of sums; a row without keys is zero."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(repeat, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * q.shape[-1] ** -0.5 + counts.log()
    sums = scores.logsumexp(-1)
    weights = (scores - sums.clamp(min=-1e30)[..., None]).exp()
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype), sums.T


class _Kernel(torch.autograd.Function):
    """Saves inputs, output, sums and rectangles, like the kernel."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rectangles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        counts = torch.from_numpy(drawn(*(x.numpy() for x in rectangles), (len(q), len(k)))).float()
        output, sums = _attention(q, k, v, counts)
        output, sums = output.contiguous(), sums.contiguous()
        ctx.save_for_backward(q, k, v, output, sums, *rectangles)
        ctx.counts = counts
        return output, sums

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
            output, _ = _attention(*inputs, ctx.counts)
            return (*torch.autograd.grad(output, inputs, gradient), None, None, None)


def flex_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    attn_type_map: torch.Tensor,
    *,
    deterministic: bool = False,
) -> tuple[torch.Tensor, SimpleNamespace]:
    """The arguments of the kernel that we use, with its checks of types and shapes."""
    assert q.dim() == k.dim() == v.dim() == 3 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0 and q.shape[2] == k.shape[2]
    assert q.dtype == k.dtype == v.dtype and isinstance(deterministic, bool) and len(q)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    count = len(q_ranges)
    for x, shape in ((q_ranges, (count, 2)), (k_ranges, (count, 2)), (attn_type_map, (count,))):
        assert x.dtype == torch.int32 and x.is_contiguous() and tuple(x.shape) == shape
    calls.append(deterministic)
    output, sums = _Kernel.apply(q, k, v, q_ranges, k_ranges, attn_type_map)
    return output, SimpleNamespace(lse=sums, max_logits=None)


#: The option ``deterministic`` of every call in this process.
calls: list[bool] = []


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the stand-in where the package would be, and let runs on a CPU choose it, with heads of any size and in fp32."""
    package, functional = ModuleType("magi_attention"), ModuleType("magi_attention.functional")
    package.__spec__ = ModuleSpec("magi_attention", None)
    functional.flex_flash_attn_func = flex_flash_attn_func
    for module in (package, functional):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for check in ("check_magi_settings", "check_magi_sizes"):
        monkeypatch.setattr(f"megatron_bagel.config.validate.{check}", lambda *_: None)
    calls.clear()
