# SPDX-License-Identifier: Apache-2.0
"""Runs that train adapters: the same on every layout, exact after a resume, and nothing but adapters changes or is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import numbers, run, run_config
from tests.training.equal_runs import CP, PP, SETTINGS, SP_TP2, TP, VPP, assert_equal, cases, stored_tensors, trained, world_of

pytestmark = pytest.mark.distributed

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lr": 1e-2, "lora_targets": ["qkv,proj", "fc1", "fc2", "connector", "vit", "vae2llm", "llm2vae"]}
DROPOUT = {**LORA, "lora_targets": ["qkv", "proj", "fc1", "fc2"], "lora_dropout": 0.1, "lora_experts": "both"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data, and a base: the checkpoint of one step of a run of all weights."""
    world = world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=447)
    run(run_config(world, world / "base", **{**SETTINGS, "total_steps": 1, "save_every": 1, "eps": 1e-6}))
    return world


def from_base(world: Path, flags: dict[str, Any]) -> dict[str, Any]:
    return {"resume_from": str(world / "base/checkpoints/0000001"), "resume_model_only": True, "init_random": False, **flags}


@pytest.fixture(scope="module")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(world, tmp_path_factory.mktemp("reference"), 1, from_base(world, LORA))


LAYOUTS = {
    "tp2-sp-pp2": (4, {**SP_TP2, PP: 2}),
    "tp2": (2, {TP: 2}),
    "tp4-two-kv-heads": (4, {TP: 4}),
    "pp2-vpp2-recompute": (2, {PP: 2, VPP: 2, "recompute_granularity": "full"}),
    "cp2-dp2": (4, {CP: 2}),
    "tp2-sp-pp2-cp2": (8, {**SP_TP2, PP: 2, CP: 2}),
    "first-stage-encoders": (2, {PP: 2, "encoder_placement": "first_stage"}),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "tp2-sp-pp2"))
def test_adapters_are_equal_on_every_layout(world: Path, tmp_path: Path, reference: Any, ranks: int, flags: dict[str, Any]) -> None:
    result = trained(world, tmp_path, ranks, from_base(world, {**LORA, **flags}))
    assert_equal(result, reference)
    for left, right in zip(result[0], reference[0], strict=True):
        assert left[1] == pytest.approx(right[1], rel=1e-6)


def test_a_checkpoint_holds_adapters_and_their_state_alone(reference: Any) -> None:
    names = set(reference[1])
    assert any(name.startswith("ema.decoder.layers.0.self_attention.gen.linear_qkv.lora_A") for name in names)
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert torch.count_nonzero(reference[1]["decoder.layers.1.mlp.und.linear_fc2.lora_B.weight"])


def test_dropout_and_resume_on_another_layout(world: Path, tmp_path: Path) -> None:
    """Dropout draws the same on two stages with recomputation as in one process, before and after a resume."""
    one = trained(world, tmp_path / "one", 1, from_base(world, DROPOUT))
    flags = from_base(world, {**SETTINGS, **DROPOUT, PP: 2, "recompute_granularity": "full", "total_steps": 1})
    run(run_config(world, tmp_path / "two", 2, **flags), 2)
    again = run(run_config(world, tmp_path / "two", **{**flags, PP: 1, "recompute_granularity": None, "total_steps": 3}))
    for left, right in zip(numbers(again), one[0], strict=True):
        assert left == pytest.approx(right, rel=1e-5)
    plain = trained(world, tmp_path / "plain", 1, from_base(world, {**DROPOUT, "lora_dropout": 0.0}))
    assert plain[0][1][1] != pytest.approx(one[0][1][1], rel=1e-6)
    stored = stored_tensors(tmp_path / "two/checkpoints/0000003")
    for name, tensor in one[1].items():
        torch.testing.assert_close(stored[name], tensor, atol=2e-5, rtol=1e-4)
