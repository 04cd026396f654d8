# SPDX-License-Identifier: Apache-2.0
"""Whole runs with condition dropout write the same ``metrics.jsonl`` on any layout; in bf16 they stay near each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runs import numbers, run, run_config
from tests.training.equal_runs import CP, OVERLAP, PP, SETTINGS, SP_TP2, VPP, cases, stored_tensors, world_of

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 20
#: Sums in another order differ in the last digits, and twenty updates carry them on.
AGREEMENT = 1e-5
#: Dropout as the guide has it, and a warm-up.
FLAGS = {**SETTINGS, "total_steps": STEPS, "save_every": STEPS, "warmup_steps": 5, "lr": 2e-4}
BF16 = {"bf16": True, "lr": 1e-4}
BF16_AGREEMENT = 2e-2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def one_process(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    config = run_config(world, tmp_path_factory.mktemp("one"), **FLAGS)
    assert min(config.model.text_cond_dropout_prob, config.model.vae_cond_dropout_prob, config.model.vit_cond_dropout_prob) > 0
    return numbers(run(config))


LAYOUTS = {
    "tp2-sp-workers": (2, {**SP_TP2, "num_workers": 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "cp2-dp2-overlap": (4, {CP: 2, **OVERLAP}),
    "dp2-full-recompute": (2, {"recompute_granularity": "full", "recompute_vit": True}),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS))
def test_twenty_steps_agree(world: Path, tmp_path: Path, one_process: list[tuple], ranks: int, flags: dict) -> None:
    history = numbers(run(run_config(world, tmp_path, ranks, **{**FLAGS, **flags}), ranks))
    assert len(history) == len(one_process) == STEPS
    for ours, theirs in zip(history, one_process, strict=True):
        assert ours == pytest.approx(theirs, rel=AGREEMENT)


BF16_LAYOUTS = {"tp2-sp": (2, SP_TP2), "pp2": (2, {PP: 2}), "tp2-sp-pp2-dp2-overlap": (8, {**SP_TP2, PP: 2, **OVERLAP})}


@pytest.fixture(scope="module")
def one_process_in_bf16(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    return numbers(run(run_config(world, tmp_path_factory.mktemp("bf16"), **{**SETTINGS, **BF16})))


@pytest.mark.parametrize(("ranks", "flags"), cases(BF16_LAYOUTS))
def test_bf16_stays_near_one_process(world: Path, tmp_path: Path, one_process_in_bf16: list[tuple], ranks: int, flags: dict) -> None:
    """Partial sums are rounded to bf16 between ranks, so no layout gives another's bits; main weights and moments are fp32."""
    history = numbers(run(run_config(world, tmp_path, ranks, **{**SETTINGS, **BF16, **flags}), ranks))
    for ours, theirs in zip(history, one_process_in_bf16, strict=True):
        assert ours == pytest.approx(theirs, rel=BF16_AGREEMENT)
    stored = stored_tensors(tmp_path / f"checkpoints/{SETTINGS['total_steps']:07d}")
    main = {name: tensor.dtype for name, tensor in stored.items() if name.startswith(("optimizer.state.", "ema."))}
    assert set(main.values()) == {torch.float32} and any(".param." in name for name in main)
    assert stored["output_layer.weight"].dtype == torch.bfloat16
