# SPDX-License-Identifier: Apache-2.0
"""The update in one pass gives the plain optimizer's numbers bit for bit, and follows it with moments in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_bagel.platform.cuda_on_cpu.fused_adam import StepInGroupAdam
from megatron_bagel.training.optim import one_pass
from megatron_bagel.training.optim.ema import ShardedEma
from megatron_bagel.training.optim.one_pass import OnePassAdamW
from megatron_bagel.training.optim.optimizer import OptimizerSettings, leaf_optimizers
from tests.distributed import run_ranks
from tests.runs import make_world, numbers, run, run_config
from tests.training.toy import GROUPS_READY, Run

STEPS = 4
SETTINGS = {
    "distributed": OptimizerSettings(lr=1e-2),
    "overlap": OptimizerSettings(lr=1e-2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=40),
    "bf16": OptimizerSettings(lr=1e-2, bf16=True),
}


def _train(settings: OptimizerSettings, warmup: bool = True) -> tuple[dict, dict, list[torch.dtype]]:
    run = Run(settings)
    ema = ShardedEma(run.modules, run.optimizer, 0.9, warmup)
    for number in range(STEPS):
        ema.prepare(number)
        run.step(number)
        ema.update(number)
    leaves = [leaf.optimizer for leaf in leaf_optimizers(run.optimizer)]
    if settings.one_pass:
        assert all(isinstance(leaf, OnePassAdamW) for leaf in leaves)
        weights = [weight for leaf in leaves for group in leaf.param_groups for weight in group["params"]]
        assert sum(len(leaf.averages) for leaf in leaves) == sum(weight.numel() > 0 for weight in weights), "the average is in the pass"
    moments = [state["exp_avg_sq"].dtype for leaf in leaves for state in leaf.state.values()]
    return run.weights(), dict(ema.named_full_tensors()), moments


def _both_ways() -> dict[str, list]:
    results = {}
    for kind, settings in SETTINGS.items():
        ways = replace(settings, one_pass=True), replace(settings, one_pass=True, state_dtype="bf16")
        results[kind] = [_train(way) for way in (settings, *ways)]
    return results


@pytest.mark.distributed
def test_one_pass_equals_adamw_and_the_average_bit_for_bit() -> None:
    for results in run_ranks(_both_ways, 2, parallel=GROUPS_READY):
        for plain, same, rounded in results.values():
            for one, other in zip(plain[:2], same[:2], strict=True):
                assert all(torch.equal(tensor, other[name]) for name, tensor in one.items()) and one.keys() == other.keys()
            assert set(same[2]) == {torch.float32} and set(rounded[2]) == {torch.bfloat16}
            for name, average in plain[1].items():
                assert not torch.equal(rounded[1][name], average)
                torch.testing.assert_close(rounded[1][name], average, rtol=0, atol=1e-3)  # of updates of 1e-2 each


def test_blocks_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of whole vectors of the processor, with a rest, against torch's kernel over everything and the average after it."""
    monkeypatch.setattr(one_pass, "_BLOCK", 64)
    torch.manual_seed(0)
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-15, "weight_decay": 0.0}
    weights = [torch.nn.Parameter(torch.randn(200)) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    averages = [weight.detach().clone() for weight in weights]
    ours, plain = OnePassAdamW([{"params": weights[:1], **group}], "fp32"), StepInGroupAdam([{"params": weights[1:], **group}])
    ours.averages, ours.decay = {weights[0]: averages[0]}, 0.9
    for _ in range(3):
        for weight, gradient in zip(weights, [torch.randn(200)] * 2, strict=True):
            weight.grad = gradient.clone()
        ours.step()
        plain.step()
        torch._foreach_lerp_(averages[1:], [weights[1].detach()], 1 - 0.9)
    assert torch.equal(*(weight.detach() for weight in weights)) and torch.equal(*averages)


def test_the_function_of_the_gpu_has_the_same_formulas() -> None:
    torch.manual_seed(0)
    for moments in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(100), torch.randn(100), torch.randn(100).to(moments), torch.rand(100).to(moments), torch.randn(100)]
        blocks, whole = ([tensor.clone() for tensor in tensors] for _ in range(2))
        numbers = one_pass._Numbers(0.01, 0.9, 0.95, 1e-15, 3, 0.99)
        one_pass._update_block(blocks, numbers)
        one_pass._update_whole(whole, 0.9, 0.95, 1e-15, *numbers.changing(torch.device("cpu")))
        for one, other in zip(blocks, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6 if one.dtype == torch.float32 else 1e-2, atol=1e-6)


def test_what_it_needs() -> None:
    with pytest.raises(ValueError, match="needs --use_distributed_optimizer"):
        OptimizerSettings(lr=1.0, one_pass=True, use_distributed_optimizer=False)
    with pytest.raises(ValueError, match="does not work with --optimizer_cpu_offload"):
        OptimizerSettings(lr=1.0, bf16=True, one_pass=True, offload_fraction=1.0)
    with pytest.raises(ValueError, match="needs --one_pass_optimizer"):
        OptimizerSettings(lr=1.0, state_dtype="bf16")


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_are_the_same_and_resume_exactly(tmp_path: Path) -> None:
    """With fp32 moments as without the flag; with bf16 moments a resumed run is the run that went on."""
    world = make_world(tmp_path / "world")
    plain = run(run_config(world, tmp_path / "plain", ranks=2), ranks=2)
    same = run(run_config(world, tmp_path / "same", ranks=2, one_pass_optimizer=True), ranks=2)
    assert numbers(same) == numbers(plain)
    flags = {"one_pass_optimizer": True, "optimizer_state_dtype": "bf16"}
    whole = run(run_config(world, tmp_path / "whole", ranks=2, **flags), ranks=2)
    assert numbers(whole) != numbers(plain) and whole[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=1e-3)
    run(run_config(world, tmp_path / "halves", ranks=2, total_steps=2, **flags), ranks=2)
    halves = run(run_config(world, tmp_path / "halves", ranks=2, auto_resume=True, **flags), ranks=2)
    assert numbers(halves) == numbers(whole)
