# SPDX-License-Identifier: Apache-2.0
"""Megatron's optimizer, as set up here, does what plain AdamW and clipping do on gradients summed over ranks."""

from __future__ import annotations

import pytest
import torch

from megatron_bagel.training.optim.optimizer import OptimizerSettings, build_optimizer, synced_parameters, wrap_ddp
from tests.distributed import run_ranks
from tests.training.toy import GROUPS_READY, Run, config, modules, reference

STEPS = 3


def _train(settings: OptimizerSettings, frozen: str) -> tuple[dict, list[float]]:
    run = Run(settings, frozen)
    norms = [run.step(number) for number in range(STEPS)]
    with synced_parameters(list(run.modules.values())):
        return run.weights(), norms


def _check(results: list[tuple[dict, list[float]]], settings: OptimizerSettings, frozen: str = "", tolerance: float = 2e-6) -> None:
    expected, _, norms = reference(STEPS, settings, 0.9, frozen)
    for weights, seen in results:
        # Gradients of bf16 weights are rounded to bf16 before they are summed in fp32.
        assert seen == pytest.approx(norms, rel=2e-3 if settings.bf16 else 1e-5)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor.float(), expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("frozen", ["", "vision", "decoder"])
def test_one_rank(single_rank: None, distributed: bool, clip: float, frozen: str) -> None:
    settings = OptimizerSettings(lr=1e-2, max_grad_norm=clip, use_distributed_optimizer=distributed)
    _check([_train(settings, frozen)], settings, frozen)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings(lr=1e-2, max_grad_norm=0.5, use_distributed_optimizer=False),
        OptimizerSettings(lr=1e-2, max_grad_norm=0.5),
        OptimizerSettings(lr=1e-2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=40),
    ],
)
def test_ranks_sum_gradients(settings: OptimizerSettings) -> None:
    _check(run_ranks(_train, 3, settings, "", parallel=GROUPS_READY), settings)


@pytest.mark.distributed
def test_bf16_keeps_fp32_main_weights() -> None:
    """Updates happen in the main weights; the bf16 weights are their rounding."""
    settings = OptimizerSettings(lr=1e-2, max_grad_norm=0.5, bf16=True)
    results = run_ranks(_train, 2, settings, "", parallel=GROUPS_READY)
    _check(results, settings, tolerance=5e-3)
    assert all(tensor.dtype == torch.bfloat16 for tensor in results[0][0].values())


def test_everything_frozen_is_refused(single_rank: None) -> None:
    settings = OptimizerSettings(lr=1.0)
    made = [module.requires_grad_(False) for module in modules().values()]
    with pytest.raises(ValueError, match="freeze_llm"):
        build_optimizer(wrap_ddp(config(), made, settings), settings)


def test_averaging_gradients_is_refused(single_rank: None) -> None:
    wrong = config()
    wrong.calculate_per_token_loss = False
    with pytest.raises(ValueError, match="calculate_per_token_loss"):
        wrap_ddp(wrong, list(modules().values()), OptimizerSettings(lr=1.0))


@pytest.mark.parametrize(
    "change",
    [{"overlap_param_gather": True}, {"distributed_optimizer_instances": 2, "use_distributed_optimizer": False}],
)
def test_settings_that_need_the_distributed_optimizer(change: dict) -> None:
    with pytest.raises(ValueError, match="use-distributed-optimizer"):
        OptimizerSettings(lr=1.0, **change)
