# SPDX-License-Identifier: Apache-2.0
"""Latents that are encoded one step early change no number: the runs are those without the flag, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import numbers, run, run_config
from tests.training.equal_runs import CP, PP, SETTINGS, SP_TP2, VPP, Result, cases, stored_tensors, world_of

pytestmark = pytest.mark.distributed

STEPS = 4
#: A global batch that grows, held-out losses in between, and workers that read ahead by themselves.
FLAGS: dict[str, Any] = {
    **SETTINGS, "total_steps": STEPS, "save_every": 2, "rampup_batch_size": [2, 2, 4], "split": "75,25", "eval_every": 2, "eval_samples": 4,
    "num_workers": 1, "on_bad_step": "rerun",
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2)


def result(world: Path, folder: Path, ranks: int, **flags: Any) -> Result:
    settings = {**FLAGS, **flags}
    history = run(run_config(world, folder, ranks, **settings), ranks)
    return numbers(history), stored_tensors(folder / f"checkpoints/{settings['total_steps']:07d}")


def assert_same_bits(ours: Result, theirs: Result) -> None:
    assert ours[0] == theirs[0] and len(ours[0]) == STEPS
    assert ours[1].keys() == theirs[1].keys()
    assert [name for name in ours[1] if not torch.equal(ours[1][name], theirs[1][name])] == []


LAYOUTS = {
    "one-process": (1, {}),
    "dp2-no-workers": (2, {"num_workers": 0}),
    "pp2": (2, {PP: 2}),
    "tp2-sp-pp2": (4, {**SP_TP2, PP: 2}),
    "cp2-pp2-vpp2": (4, {CP: 2, PP: 2, VPP: 2}),
    "first-stage-pp2": (2, {PP: 2, "encoder_placement": "first_stage"}),
}


@pytest.mark.parametrize(("ranks", "layout"), cases(LAYOUTS, "one-process", "pp2"))
def test_the_same_bits_as_without(world: Path, tmp_path: Path, ranks: int, layout: dict[str, Any]) -> None:
    """The run with early latents is stopped after two steps, and continues from its checkpoint."""
    expected = result(world, tmp_path / "plain", ranks, **layout)
    early = {**layout, "overlap_vae_encode": True}
    run(run_config(world, tmp_path / "early", ranks, **{**FLAGS, **early, "total_steps": 2}), ranks)
    assert_same_bits(result(world, tmp_path / "early", ranks, **early), expected)
