# SPDX-License-Identifier: Apache-2.0
"""Every backend equals the dense oracle, forward and backward, on random packs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings

from benchmarks.long_packs import KINDS, LONG
from megatron_bagel.layout.blocks import block_occupancy
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.model.attention.dense import DensePlan
from megatron_bagel.model.attention.flex import FlexPlan, block_mask
from megatron_bagel.model.attention.sdpa import SdpaPlan
from megatron_bagel.model.batch import attention_backend, attention_plan
from tests.strategies import SPEC, samples


def _qkv(tokens: int, heads: int = 4, groups: int = 2, dim: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, n, dim, generator=generator).requires_grad_() for n in (heads, groups, groups)]


def _kept(plan: list[Sample]) -> list[list[Item]]:
    return [[item for item in sample.items if not item.dropped] for sample in plan]


#: What the random packs must be able to be, told of the items that are left in each sample.
REACHED: dict[str, Callable[[list[list[Item]]], bool]] = {
    "a sample of one split": lambda kept: any(len(items) == 1 for items in kept),
    "only text": lambda kept: any(kept) and all(item.kind == "text" for items in kept for item in items),
    "only images": lambda kept: all(kept) and all(item.kind != "text" for items in kept for item in items),
    "a noise split first": lambda kept: any(len(items) > 1 and items[0].loss and items[0].kind == "vae" for items in kept),
    "a noise split last": lambda kept: any(len(items) > 1 and items[-1].loss and items[-1].kind == "vae" for items in kept),
    "no generation token": lambda kept: all(kept) and all(item.kind != "vae" for items in kept for item in items),
}


@pytest.mark.parametrize("what", REACHED)
def test_random_packs_reach(what: str) -> None:
    assert find(samples(), lambda plan: REACHED[what](_kept(plan)))


@settings(max_examples=60, deadline=None)
@given(samples(max_samples=6))
def test_sdpa_equals_the_oracle(plan: list[Sample]) -> None:
    pack = build_pack(plan, SPEC)
    mask, order = PackMask.of(pack), expert_order(pack)
    results = []
    for backend in (DensePlan, SdpaPlan):
        qkv = _qkv(order.length)
        out = backend(mask, order).attend(*qkv, layer_number=1)
        weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
        (out * weights).sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    for oracle, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, oracle, atol=1e-5, rtol=1e-5)


@settings(max_examples=10, deadline=None)
@given(samples())
def test_flex_equals_the_oracle_forward(plan: list[Sample]) -> None:
    """FlexAttention has no backward pass on CPUs; the block mask and the mask function are what is ours, and both are used here."""
    pack = build_pack(plan, SPEC)
    mask, order = PackMask.of(pack), expert_order(pack, length=pack.sequence_length + 5)
    if not len(order.positions):
        return
    q, k, v = (x.detach() for x in _qkv(len(order.positions), dim=16))
    oracle = DensePlan(mask, order).attend(q, k, v, layer_number=1)
    torch.testing.assert_close(FlexPlan(mask, order).attend(q, k, v, layer_number=1), oracle, atol=1e-5, rtol=1e-5)


def test_flash_attention_4_gets_the_same_mask() -> None:
    """Its kernel exists on a GPU only. Here is shown what reaches it: the same block mask, and the order to use this kernel."""
    pack = build_pack([Sample("set", 0, 0, (Item("text", ids=np.arange(5, 25)),))], SPEC)
    mask, order = PackMask.of(pack), expert_order(pack)
    calls, q, k, v = [], *(x.detach() for x in _qkv(len(order.positions), dim=16))
    for backend in ("flex", "flex_flash"):
        plan = attention_backend(backend)(mask, order)
        plan.kernel = lambda *args, kernel=plan.kernel, **kwargs: (
            calls.append(kwargs) or kernel(*args, **{**kwargs, "kernel_options": None})
        )
        torch.testing.assert_close(plan.attend(q, k, v, 1), DensePlan(mask, order).attend(q, k, v, 1), atol=1e-5, rtol=1e-5)
    assert [call["kernel_options"] for call in calls] == [None, {"BACKEND": "FLASH"}]
    assert torch.equal(calls[0]["block_mask"].to_dense(), calls[1]["block_mask"].to_dense())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_block_masks_of_long_packs_are_those_of_the_layout(kind: Callable[[], list[Sample]]) -> None:
    """From the segments to FlexAttention's own object."""
    pack = build_pack(kind(), LONG)
    mask, order = PackMask.of(pack), expert_order(pack)
    blocks = block_mask(mask, order, "cpu").to_dense()
    assert torch.equal(blocks[0, 0].bool(), torch.from_numpy(block_occupancy(mask, order).occupied))


def test_unknown_backend_is_refused() -> None:
    pack = build_pack([], SPEC)
    with pytest.raises(ValueError, match="attention-backend"):
        attention_plan("magic", PackMask.of(pack), expert_order(pack), "cpu")
