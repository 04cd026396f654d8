# SPDX-License-Identifier: Apache-2.0
"""Experts on two ranks: different packs, a rank without generation tokens, an expert without tokens, and unequal gathers on gloo."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_scatter_to_sequence_parallel_region

from megatron_bagel.checkpoint.hf.initial_weights import initialise
from megatron_bagel.checkpoint.hf.load import named_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.costs.freezing import FreezeSettings, freeze
from megatron_bagel.layout.items import Item, Sample
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.sparse_mlp import set_global_tokens
from tests.distributed import run_ranks
from tests.model.test_bagel import MIXED
from tests.model.test_sparse_experts import config_of, sparse_arch
from tests.model.tiny import microbatch
from tests.strategies import SPEC

pytestmark = pytest.mark.distributed
TEXT = [Sample("set", 0, 0, (Item("text", ids=np.arange(5, 25), loss=True),))]


def gradients(packs: list[int], dispatcher: str, expert_parallel: int) -> dict[str, torch.Tensor]:
    """Gradients of the packs by global name. There are too few generation tokens for every one of the 16 experts."""
    arch = sparse_arch(2, num_experts=16)
    model = build_decoder(arch, config_of(arch, expert_model_parallel_size=expert_parallel, moe_token_dispatcher_type=dispatcher))
    initialise([model], WeightMap(arch), 1)
    plans = [MIXED, TEXT]
    batches = [microbatch(plan, arch, SPEC) for plan in plans]
    for number in packs:
        set_global_tokens(model, sum(batch.n_und for batch in batches), sum(batch.n_vae for batch in batches))
        ce, mse = model(batches[number])
        (ce.sum() + mse.sum()).backward()
    return {name: parameter.grad for name, parameter in named_weights([model]).items()}


def on_rank(dispatcher: str) -> dict[str, torch.Tensor]:
    """Gradients of this rank's pack. Those of experts cover all ranks already, the others are summed here."""
    rank = dist.get_rank()
    local = gradients([rank], dispatcher, expert_parallel=2)
    for name, gradient in sorted(local.items()):
        if ".local_experts." not in name:
            dist.all_reduce(gradient)
    unequal = torch.arange(6.0).view(3, 2)[: 1 + 2 * rank].clone().requires_grad_()
    gathered = gather_from_sequence_parallel_region(unequal, group=dist.group.WORLD, output_split_sizes=[1, 3])
    assert gathered[:, 0].tolist() == [0, 0, 2, 4]
    scattered = reduce_scatter_to_sequence_parallel_region(gathered, group=dist.group.WORLD, input_split_sizes=[1, 3])
    assert torch.equal(scattered, 2 * unequal)
    return local


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_two_ranks_equal_one(single: dict[str, dict[str, torch.Tensor]], dispatcher: str) -> None:
    ranks = run_ranks(on_rank, 2, dispatcher, parallel={"expert_model_parallel_size": 2})
    expected = single[dispatcher]
    assert {name for rank in ranks for name in rank} == set(expected)
    idle_experts = [name for name, gradient in expected.items() if ".local_experts." in name and not gradient.any()]
    assert any(".gen." in name for name in idle_experts)  # an expert without a token
    for rank in ranks:
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def mixed_gradients(frozen: bool, shared: int | None = None) -> dict[str, torch.Tensor]:
    """Gradients of one pack, on this rank or on both tensor-parallel ranks: sparse generation experts, or sparse frozen understanding.

    ``shared`` is the width of a shared expert with a gate.
    """
    tensor = dist.get_world_size()
    more = {"shared_expert_intermediate_size": shared, "shared_expert_gate": True} if shared else {}
    arch = sparse_arch(2, sparse_kinds=("und",) if frozen else ("gen",), mlp_only_layers=(1,), **more)
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1} if tensor == 2 else {}
    model = build_decoder(arch, config_of(arch, **parallel, expert_model_parallel_size=tensor), freeze_und=frozen)
    initialise([model], WeightMap(arch), 1)
    freeze(model, None, FreezeSettings(und=frozen))
    batch = microbatch(MIXED, arch, SPEC, padding=5)
    if tensor == 2:
        batch = replace(batch, length=batch.length + batch.length % 2, position_ids=F.pad(batch.position_ids, (0, batch.length % 2)))
    set_global_tokens(model, batch.n_und, batch.n_vae)
    ce, mse = model(batch)
    (ce.sum() + mse.sum()).backward()
    gradients = {}
    for name, parameter in sorted(named_weights([model]).items()):
        if parameter.grad is None:
            continue
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(parameter.grad)
        if ".local_experts." in name or not getattr(parameter, "tensor_model_parallel", False):
            gradients[name] = parameter.grad
    return gradients


@pytest.mark.parametrize("frozen", [False, True])
def test_a_sparse_kind_beside_a_dense_one_on_two_tensor_parallel_ranks(frozen: bool) -> None:
    groups = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    ranks = run_ranks(mixed_gradients, 2, frozen, parallel=groups)
    expected = run_ranks(mixed_gradients, 1, frozen, parallel={})[0]
    assert any(".local_experts." in name for name in expected) is not frozen
    for rank in ranks:
        assert any(".router." in name for name in rank) is not frozen
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_a_shared_expert_on_two_tensor_parallel_ranks_with_unequal_rows() -> None:
    groups = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    ranks = run_ranks(mixed_gradients, 2, False, 8, parallel=groups)
    expected = run_ranks(mixed_gradients, 1, False, 8, parallel={})[0]
    assert any(name.endswith("shared_experts.gate_weight") for name in expected)
    for rank in ranks:
        assert any(name.endswith("shared_experts.gate_weight") for name in rank)
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def on_one_rank() -> dict[str, dict[str, torch.Tensor]]:
    return {dispatcher: gradients([0, 1], dispatcher, expert_parallel=1) for dispatcher in ("alltoall", "allgather")}


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, torch.Tensor]]:
    return run_ranks(on_one_rank, 1, parallel={})[0]
