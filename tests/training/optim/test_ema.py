# SPDX-License-Identifier: Apache-2.0
"""The sharded average equals the plain one, comes back bit for bit from full tensors and checkpoints, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_bagel.common.assignment import longest_first
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.optimizer import OptimizerSettings, synced_parameters
from tests.distributed import run_ranks
from tests.training.toy import GROUPS_READY, Run, reference

DECAY, STEPS = 0.9, 3
SETTINGS = {
    "plain": OptimizerSettings(lr=1e-2, use_distributed_optimizer=False),
    "distributed": OptimizerSettings(lr=1e-2),
    "overlap": OptimizerSettings(lr=1e-2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=40),
    "bf16": OptimizerSettings(lr=1e-2, bf16=True),
    "bf16 plain": OptimizerSettings(lr=1e-2, bf16=True, use_distributed_optimizer=False),
}


def _trained(kind: str, frozen: str = "") -> tuple[Run, ShardedEma]:
    run = Run(SETTINGS[kind], frozen)
    ema = ShardedEma(run.modules, run.optimizer, DECAY)
    for number in range(STEPS):
        run.step(number)
        ema.update()
    return run, ema


def _averages_and_swap(kind: str) -> dict:
    run, ema = _trained(kind)
    with synced_parameters(list(run.modules.values())):
        before = run.weights()
    full = dict(ema.named_full_tensors())
    with ema.applied():
        inside = run.weights()
    after = run.weights()
    run.step(STEPS)
    return {"full": full, "before": before, "inside": inside, "after": after, "bytes": ema.local_bytes()}


@pytest.mark.distributed
@pytest.mark.parametrize("kind", list(SETTINGS))
def test_equals_the_plain_average_and_swaps_in_and_out(kind: str) -> None:
    results = run_ranks(_averages_and_swap, 2, kind, parallel=GROUPS_READY)
    _, average, _ = reference(STEPS, SETTINGS[kind], DECAY)
    tolerance = 5e-3 if SETTINGS[kind].bf16 else 2e-6
    for result in results:
        assert result["full"].keys() == average.keys()
        for name, tensor in result["full"].items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, average[name], rtol=tolerance, atol=tolerance)
            assert torch.equal(result["inside"][name], tensor.to(result["inside"][name].dtype))
            assert torch.equal(result["after"][name], result["before"][name])
    whole = sum(tensor.numel() * 4 for tensor in average.values())
    assert sum(result["bytes"] for result in results) == whole
    assert max(result["bytes"] for result in results) < 0.75 * whole


def test_frozen_parameters_are_not_tracked(single_rank: None) -> None:
    _, ema = _trained("distributed", frozen="vision")
    assert ema.names and all(name.startswith("decoder.") for name in ema.names)


def test_full_tensors_load_back_and_reset(single_rank: None) -> None:
    run, ema = _trained("distributed")
    full = {name: tensor.clone() for name, tensor in ema.named_full_tensors()}
    full["vision.0.bias"][:2] = torch.tensor([-0.0, float("nan")])
    ema.reset()
    assert torch.equal(dict(ema.named_full_tensors())["vision.0.weight"], run.weights()["vision.0.weight"])
    for name, tensor in full.items():
        ema.load_full_tensor(name, tensor)
    for name, tensor in ema.named_full_tensors():
        assert torch.equal(tensor.view(torch.int32), full[name].view(torch.int32))


def test_wrong_tensors_are_refused(single_rank: None) -> None:
    _, ema = _trained("plain")
    with pytest.raises(ValueError, match="decoder.9"):
        ema.load_full_tensor("decoder.9.weight", torch.zeros(1))
    with pytest.raises(ValueError, match="shape"):
        ema.load_full_tensor("vision.0.bias", torch.zeros(4))
    run, _ = _trained("plain")
    with pytest.raises(ValueError, match="ema is 1.0"):
        ShardedEma(run.modules, run.optimizer, 1.0)


def _model_state(run: Run) -> dict:
    return {
        prefix: make_sharded_tensors_for_checkpoint(module.module.state_dict(keep_vars=True), f"{prefix}.")
        for prefix, module in run.modules.items()
    }


def _save(kind: str, folder: str) -> dict:
    run, ema = _trained(kind)
    if dist.get_rank() == 0:
        Path(folder).mkdir()
    dist.barrier()
    dist_checkpointing.save({"ema": ema.sharded_state_dict(_model_state(run))}, folder)
    return {name: tensor.clone() for name, tensor in ema.named_full_tensors()}


def _load(kind: str, folder: str) -> dict:
    run = Run(SETTINGS[kind])
    ema = ShardedEma(run.modules, run.optimizer, DECAY)
    request = {"ema": ema.sharded_state_dict(_model_state(run), is_loading=True)}
    ema.load_state_dict(dist_checkpointing.load(request, folder)["ema"])
    return {name: tensor.clone() for name, tensor in ema.named_full_tensors()}


@pytest.mark.distributed
def test_checkpoint_continues_on_other_layouts(tmp_path: Path) -> None:
    """Saved once: the writer's helper process costs each rank the import of torch."""
    folder = tmp_path / "checkpoint"
    saved = run_ranks(_save, 2, "distributed", str(folder), parallel=GROUPS_READY, timeout=240)
    for kind, ranks in (("distributed", 3), ("plain", 1), ("bf16", 2)):
        loaded = run_ranks(_load, ranks, kind, str(folder), parallel=GROUPS_READY)
        for name, tensor in saved[0].items():
            assert all(torch.equal(result[name], tensor) for result in loaded)


@given(st.lists(st.integers(0, 1000), max_size=30), st.integers(1, 8))
def test_dealing_is_balanced(sizes: list[int], ranks: int) -> None:
    owners = longest_first(sizes, ranks)
    load = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank) for rank in range(ranks)]
    # Largest first to the least loaded: no rank is more than one tensor above the mean.
    assert max(load) <= sum(sizes) / ranks + max(sizes, default=0)
