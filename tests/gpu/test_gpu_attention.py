# SPDX-License-Identifier: Apache-2.0
"""Attention backends on the GPU equal the dense oracle, forward and backward, and one compiled kernel serves packs of every length."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from benchmarks.long_packs import KINDS, LONG
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.model.attention.dense import DensePlan
from megatron_bagel.model.attention.flex import FlexFlashPlan, FlexPlan
from megatron_bagel.model.attention.magi import MagiPlan
from megatron_bagel.model.attention.sdpa import SdpaPlan
from tests.strategies import SPEC

DEVICE = "cuda"
#: Heads, key/value heads, head size: a small model, Qwen2.5-7B's, and one whose head size is no power of two.
HEADS = {"small": (4, 2, 16), "7b": (28, 4, 128), "odd": (6, 3, 80)}
BACKENDS = {"flex": FlexPlan, "sdpa": SdpaPlan} | ({"flex_flash": FlexFlashPlan} if find_spec("flash_attn") else {})


def mixed_pack(seed: int, samples: int = 6) -> tuple[PackMask, TokenOrder]:
    """Texts, pictures to read, to edit and to draw; a few hundred tokens, with slots that hold nothing."""
    random = np.random.default_rng(seed)
    plan = []
    for number in range(samples):
        items = [Item("text", ids=random.integers(5, 60, random.integers(1, 40)), loss=bool(random.integers(2)))]
        for kind in random.permutation(["vit", "vae"])[: random.integers(0, 3)]:
            stride = 14 if kind == "vit" else 16
            items.append(Item(str(kind), image=0, height=int(random.integers(1, 9)) * stride, width=int(random.integers(1, 9)) * stride))
        if random.integers(2):
            items.append(Item("vae", loss=True, image=0, height=int(random.integers(1, 9)) * 16, width=128))
        plan.append(Sample("set", number, 0, tuple(items)))
    pack = build_pack(plan, SPEC)
    return PackMask.of(pack), expert_order(pack, length=pack.sequence_length + int(random.integers(0, 9)))


def both_ways(plan: object, tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values, in fp32."""
    count, groups, dim = heads
    generator = torch.Generator().manual_seed(tokens)
    qkv = [torch.randn(tokens, n, dim, generator=generator).to(DEVICE, dtype).requires_grad_() for n in (count, groups, groups)]
    out = plan.attend(*qkv, layer_number=1)
    weights = torch.randn(out.shape, generator=generator).to(DEVICE, dtype)
    (out * weights).sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in qkv)]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_oracle(backend: str, heads: str) -> None:
    """fp32 to 1e-4; bf16 within 1 % of fp32's result, in the L2 norm over each tensor."""
    for seed in range(3):
        mask, order = mixed_pack(seed)
        tokens = len(order.positions)
        oracle = both_ways(DensePlan(mask, order, DEVICE), tokens, HEADS[heads], torch.float32)
        plan = BACKENDS[backend](mask, order, DEVICE)
        for ours, theirs in zip(both_ways(plan, tokens, HEADS[heads], torch.float32), oracle, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        plan = BACKENDS[backend](mask, order, DEVICE)
        for ours, theirs in zip(both_ways(plan, tokens, HEADS[heads], torch.bfloat16), oracle, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


@pytest.mark.skipif(find_spec("magi_attention") is None, reason="magi_attention is not installed")
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="the kernel needs Hopper")
@pytest.mark.parametrize("heads", [(4, 2, 64), (28, 4, 128)], ids=["64", "7b"])
def test_magi_equals_the_oracle(heads: tuple[int, int, int]) -> None:
    """bf16 within 1 % of fp32's result; the kernel has no fp32."""
    for seed in range(3):
        mask, order = mixed_pack(seed)
        tokens = len(order.positions)
        oracle = both_ways(DensePlan(mask, order, DEVICE), tokens, heads, torch.float32)
        for ours, theirs in zip(both_ways(MagiPlan(mask, order, DEVICE), tokens, heads, torch.bfloat16), oracle, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


def test_one_kernel_for_every_length() -> None:
    """Each pack has another length and another mask; a kernel compiled for each would stop a run for seconds at every step."""
    graphs = []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(12):
        mask, order = mixed_pack(seed, samples=3 + seed)
        both_ways(FlexPlan(mask, order, DEVICE), len(order.positions), HEADS["small"], torch.bfloat16)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[3] <= 4, graphs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_long_packs(kind: Callable[[], list[Sample]]) -> None:
    """32k tokens at the head size of the 7B model: finite, and equal to a direct softmax of some queries in fp64."""
    pack = build_pack(kind(), LONG)
    mask, order = PackMask.of(pack), expert_order(pack)
    generator = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(order.length, n, 128, generator=generator, device=DEVICE, dtype=torch.bfloat16) for n in (4, 2, 2))
    out = FlexPlan(mask, order, DEVICE).attend(q, k, v, layer_number=1)
    rows = np.random.default_rng(0).choice(len(order.positions), 64, replace=False)
    allowed = torch.from_numpy(mask.allowed(order.positions[rows], order.positions)).to(DEVICE)
    keys, values = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q[rows].double(), keys) / math.sqrt(128)
    weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    direct = torch.einsum("hqk,khd->qhd", weights, values).flatten(1)
    assert float((out[rows].double() - direct).norm() / direct.norm()) < 1e-2
