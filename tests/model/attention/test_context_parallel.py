# SPDX-License-Identifier: Apache-2.0
"""Several ranks that share a pack compute what one rank computes, outputs and gradients, however its tokens are dealt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.layout.cp_partition import concatenated, context_orders
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import Pack, build_pack
from megatron_bagel.model.attention.context_parallel import AllToAllPlan, CPContext, context_plan
from megatron_bagel.model.attention.dense import DensePlan
from megatron_bagel.model.attention.flex import FlexPlan
from megatron_bagel.model.attention.sdpa import SdpaPlan
from megatron_bagel.model.batch import attention_plan
from tests.distributed import run_ranks
from tests.strategies import SPEC, samples

pytestmark = pytest.mark.distributed
HEADS, DIM = {2: (4, 2), 4: (8, 4)}, 8


def _qkv(pack: Pack, heads: int, groups: int) -> list[torch.Tensor]:
    """Query, key and value of every position."""
    generator = torch.Generator().manual_seed(pack.sequence_length)
    return [torch.randn(pack.sequence_length, n, DIM, generator=generator) for n in (heads, groups, groups)]


def _weights(shape: torch.Size) -> torch.Tensor:
    return torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)


def _oracle(pack: Pack, qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients in sequence order, from one dense mask."""
    places = np.arange(pack.sequence_length)
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = DensePlan(PackMask.of(pack), TokenOrder(places, places, len(places), places, places, places)).attend(*leaves, 1)
    (out * _weights(out.shape)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def _check(pack: Pack, orders: list[TokenOrder], comm_type: str, backend: str = "sdpa") -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    qkv = _qkv(pack, *HEADS[size])
    oracle = _oracle(pack, qkv)
    place = CPContext(rank, dist.group.WORLD, orders, comm_type)
    plan = attention_plan(backend, PackMask.of(pack), orders[rank], "cpu", place)
    here = torch.from_numpy(orders[rank].positions)
    leaves = [x[here].clone().requires_grad_() for x in qkv]
    out = plan.attend(*leaves, layer_number=1)
    (out * _weights(oracle[0].shape)[here]).sum().backward()
    for expected, found in zip(oracle, [out.detach(), *(x.grad for x in leaves)], strict=True):
        torch.testing.assert_close(found, expected[here], atol=1e-5, rtol=1e-5)


def _random_orders(pack: Pack, ranks: int, seed: int) -> list[TokenOrder]:
    """Any split of the tokens: counts differ, some ranks hold one kind of token or nothing."""
    generator = np.random.default_rng(seed)
    owners = np.empty(pack.sequence_length, dtype=np.int64)
    for places in (pack.text_positions, pack.vit_positions, pack.vae_positions):
        holders = generator.choice(ranks, size=generator.integers(1, ranks + 1), replace=False)
        owners[places] = generator.choice(holders, size=len(places))
    length = int(np.bincount(owners, minlength=ranks).max(initial=0)) + 1
    return [expert_order(pack, owners == rank, length) for rank in range(ranks)]


def _every_pack(plans: list[list[Sample]], ranks: int) -> None:
    for number, plan in enumerate(plans):
        pack = build_pack(plan, SPEC)
        for comm_type in ("all_gather", "a2a"):
            _check(pack, context_orders(pack, ranks), comm_type)
            _check(pack, _random_orders(pack, ranks, number), comm_type)
            _check(pack, context_orders(pack, ranks, multiple=4), comm_type, "dense")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@settings(max_examples=4, deadline=None)
@given(plans=st.lists(samples(max_samples=6), min_size=6, max_size=12))
def test_ranks_equal_the_oracle(ranks: int, plans: list[list[Sample]]) -> None:
    run_ranks(_every_pack, ranks, plans, ranks)


def _only(kind: str) -> list[Sample]:
    side = 14 if kind == "vit" else 16
    item = Item("text", ids=np.arange(5, 30)) if kind == "text" else Item(kind, image=0, height=2 * side, width=3 * side)
    return [Sample("set", 0, 0, (item,))]


def test_packs_of_one_kind_and_empty_packs() -> None:
    run_ranks(_every_pack, 4, [_only("text"), _only("vit"), _only("vae"), [], [Sample("set", 0, 0, (Item("text", ids=np.arange(0)),))]], 4)


@settings(max_examples=10, deadline=None)
@given(samples(), st.integers(1, 4))
def test_flex_with_keys_of_other_ranks_equals_the_oracle(plan: list[Sample], ranks: int) -> None:
    """Forward only: FlexAttention has no backward pass on CPUs. No process group is needed to hold keys of other ranks."""
    pack = build_pack(plan, SPEC)
    if not pack.sequence_length:
        return
    mask, orders = PackMask.of(pack), context_orders(pack, ranks, multiple=8)
    keys = concatenated(orders)
    q, k, v = (x.repeat(1, 1, 2) for x in _qkv(pack, 4, 2))
    for order in orders:
        arguments = (q[order.positions], k[keys.positions], v[keys.positions], 1)
        oracle = DensePlan(mask, order, keys=keys).attend(*arguments)
        for backend in (FlexPlan, SdpaPlan):
            torch.testing.assert_close(backend(mask, order, keys=keys).attend(*arguments), oracle, atol=1e-5, rtol=1e-5)


def test_what_cannot_work_is_refused() -> None:
    pack = build_pack(_only("text"), SPEC)
    place = CPContext(0, None, context_orders(pack, 3), "a2a")
    here = len(place.orders[0].positions)
    with pytest.raises(ValueError, match="4 heads and 2 KV heads between --context-parallel-size 3"):
        AllToAllPlan(SdpaPlan, PackMask.of(pack), place).attend(*(x[:here] for x in _qkv(pack, 4, 2)), 1)
    with pytest.raises(ValueError, match="cp-comm-type 'ring'"):
        context_plan(SdpaPlan, PackMask.of(pack), CPContext(0, None, place.orders, "ring"))
