# SPDX-License-Identifier: Apache-2.0
"""A run that starts from another one's export stands where that one stopped: same held-out losses before anything is learned."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.cli.convert import megatron_to_hf
from megatron_bagel.training.observability.metrics_file import read_history
from tests.runs import make_world, run, run_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

EVALUATION = {"split": "75,25", "eval_every": 6, "eval_samples": 6, "eval_pictures": 0}


@pytest.mark.parametrize(("weights", "dtype", "bound"), [("ema", "fp32", 1e-4), ("ema", "bf16", 1e-2)])
def test_the_export_continues_where_the_run_stopped(tmp_path: Path, weights: str, dtype: str, bound: float) -> None:
    world = make_world(tmp_path / "world")
    # An average that follows closely, so that it differs from a fresh model's as the weights do.
    run(run_config(world, tmp_path / "first", total_steps=6, save_every=6, ema=0.5, **EVALUATION))
    (stopped,) = read_history(tmp_path / "first/validation.jsonl")
    export = ["--checkpoint", str(tmp_path / "first/checkpoints"), "--output", str(tmp_path / "model"), "--dtype", dtype]
    assert megatron_to_hf.main([*export, "--weights", weights]) == 0
    started = {
        "finetune_from_hf": True, "model_path": str(tmp_path / "model"), "resume_from": str(tmp_path / "model"), "init_random": False,
        "resume_model_only": True, "finetune_from_ema": True, "total_steps": 1, "lr": 1e-12, "warmup_steps": 0,
    }  # fmt: skip
    run(run_config(world, tmp_path / "second", **{**EVALUATION, **started, "eval_every": 1}))
    (continued,) = read_history(tmp_path / "second/validation.jsonl")
    names = [name for name in stopped if name.startswith("ema/") and "/t" not in name]
    assert {"ema/ce", "ema/mse", "ema/ce/vlm_sft"} <= set(names)
    for name in names:
        assert continued[name] == pytest.approx(stopped[name], rel=bound), name
        assert continued[name.replace("ema/", "model/")] == pytest.approx(stopped[name], rel=bound), name
