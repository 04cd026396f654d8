# SPDX-License-Identifier: Apache-2.0
"""MagiAttention's kernel gets the right mask and tensors: a stand-in with its contract equals the oracle, and runs equal SDPA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_bagel.layout.cp_partition import concatenated, context_orders
from megatron_bagel.layout.items import Sample
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import build_pack
from megatron_bagel.model.attention.dense import DensePlan
from megatron_bagel.model.batch import attention_backend
from tests import magi_stand_in
from tests.runs import numbers, run, run_config
from tests.strategies import SPEC, samples
from tests.training.equal_runs import COMM, CP, SP_TP2, world_of


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    magi_stand_in.install(monkeypatch)


def both_ways(plan: Any, counts: tuple[int, int], heads: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients. Values are a view of a wider tensor, as in the layer."""
    count, groups, dim = heads
    generator = torch.Generator().manual_seed(sum(counts))
    q = torch.randn(counts[0], count, dim, generator=generator).to(dtype).requires_grad_()
    mixed = torch.randn(counts[1], 2 * groups, dim, generator=generator).to(dtype).requires_grad_()
    k, v = mixed.chunk(2, 1)
    out = plan.attend(q, k, v, layer_number=1)
    (out * torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(dtype)).sum().backward()
    return [out.detach(), q.grad, mixed.grad]


def assert_equal(mask: PackMask, order: TokenOrder, keys: TokenOrder | None, heads: tuple[int, int, int]) -> None:
    counts = (len(order.positions), len((keys or order).positions))
    plan, oracle = attention_backend("magi")(mask, order, keys=keys), DensePlan(mask, order, keys=keys)
    for ours, theirs in zip(*(both_ways(each, counts, heads, torch.float32) for each in (plan, oracle)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(*(both_ways(each, counts, heads, torch.bfloat16) for each in (plan, oracle)), strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0.05, rtol=0.05)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples(max_samples=6), st.sampled_from([(4, 2, 8), (6, 2, 16), (3, 3, 8)]))
def test_equals_the_oracle(stand_in: None, plan: list[Sample], heads: tuple[int, int, int]) -> None:
    """Slots of padding are in none of its tensors."""
    pack = build_pack(plan, SPEC)
    if pack.sequence_length:
        assert_equal(PackMask.of(pack), expert_order(pack, length=pack.sequence_length + 5), None, heads)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(samples(), st.integers(2, 4))
def test_with_keys_of_other_ranks_equals_the_oracle(stand_in: None, plan: list[Sample], ranks: int) -> None:
    pack = build_pack(plan, SPEC)
    orders = context_orders(pack, ranks, multiple=8)
    for order in orders:
        if len(order.positions):
            assert_equal(PackMask.of(pack), order, concatenated(orders), (4, 2, 8))


def test_a_rank_without_tokens_keeps_keys_and_values_in_the_graph(stand_in: None) -> None:
    mask = PackMask(np.array([3]), np.array([3]), np.array([0]))
    empty, positions = np.zeros(0, dtype=np.int64), np.arange(3)
    queries = TokenOrder(empty, np.full(3, -1), 8, empty, empty, empty)
    plan = attention_backend("magi")(mask, queries, keys=TokenOrder(positions, positions, 3, positions, empty, empty))
    q, k, v = (torch.zeros(rows, heads, 8, requires_grad=True) for rows, heads in ((0, 4), (3, 2), (3, 2)))
    out = plan.attend(q, k, v, 1)
    out.sum().backward()
    assert out.shape == (0, 32) and not k.grad.any() and not v.grad.any()


def test_deterministic_where_torch_is(stand_in: None) -> None:
    mask, positions = PackMask(np.array([3]), np.array([3]), np.array([0])), np.arange(3)
    plan = attention_backend("magi")(mask, TokenOrder(positions, positions, 3, positions, positions, positions))
    qkv = [torch.ones(3, 2, 8)] * 3
    plan.attend(*qkv, 1)
    torch.use_deterministic_algorithms(True)
    try:
        plan.attend(*qkv, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert magi_stand_in.calls == [False, True]


def test_without_the_package_a_plan_says_its_name() -> None:
    positions = np.arange(3)
    order = TokenOrder(positions, positions, 3, positions, positions, positions)
    with pytest.raises(ImportError, match="magi_attention"):
        attention_backend("magi")(PackMask(np.array([3]), np.array([3]), np.array([0])), order)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, {}),
        (1, {"recompute_granularity": "selective"}),
        pytest.param(1, {"recompute_granularity": "full"}, marks=pytest.mark.slow),
        (2, {CP: 2}),
        pytest.param(2, {CP: 2, COMM: "a2a"}, marks=pytest.mark.slow),
        pytest.param(2, SP_TP2, marks=pytest.mark.slow),
    ],
    ids=["one", "selective", "full", "cp2", "cp2-a2a", "tp2-sp"],
)
def test_runs_equal_those_with_sdpa(stand_in: None, world: Path, tmp_path: Path, ranks: int, flags: dict[str, Any]) -> None:
    """Losses, gradient norms and counts of every step."""
    found = [
        numbers(run(run_config(world, tmp_path / backend, ranks, attention_backend=backend, total_steps=3, **flags), ranks))
        for backend in ("sdpa", "magi")
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=5e-7, atol=5e-7)
