# SPDX-License-Identifier: Apache-2.0
"""Evaluation on every layout: the same held-out losses and the same pictures as on one process, and training that does not notice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_bagel.training.observability.metrics_file import read_history
from tests.runs import numbers, run, run_config
from tests.training.equal_runs import CP, EP, ETP, PP, SP_TP2, SPARSE, VPP, cases, world_of

pytestmark = pytest.mark.distributed

SETTINGS = {
    "global_batch_size": 4, "total_steps": 2, "save_every": 2, "warmup_steps": 0, "eps": 1e-6, "split": "75,25",
    "eval_samples": 3, "eval_pictures": 1, "eval_timesteps": 4, "eval_answer_tokens": 3,
}  # fmt: skip


def evaluated(world: Path, results: Path, ranks: int, **flags: Any) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """Lines of metrics.jsonl and of validation.jsonl."""
    history = run(run_config(world, results, ranks, **{**SETTINGS, "eval_every": 2, **flags}), ranks)
    return history, read_history(results / "validation.jsonl")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), num_attention_heads=4, num_key_value_heads=2, vocab_size=448)


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    folder = tmp_path_factory.mktemp("alone")
    return folder, *evaluated(world, folder, 1)


def samples(results: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    folder = results / "samples"
    sheets = {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))}
    return sheets, [json.loads(line) for line in (folder / "0000002.jsonl").read_text().splitlines()]


def test_losses_by_dataset_and_timestep(alone: tuple) -> None:
    folder, history, (line,) = alone
    assert line["step"] == 2
    for weights in ("model", "ema"):
        for name in ("ce", "ce/vlm_sft", "ce/vlm_sft/llava_ov", "ce/text/text", "mse", "mse/t2i_pretrain/t2i", "mse/unified_edit"):
            assert line[f"{weights}/{name}"] > 0
        assert any(name.startswith(f"{weights}/mse/t2i_pretrain/t2i/t") for name in line)
    assert line["model/mse"] != line["ema/mse"]
    for record in history:
        assert record["mse/t2i_pretrain"] == record["mse/t2i_pretrain/t2i"] and record["ce/vlm_sft"] > 0
    sheets, texts = samples(folder)
    assert list(sheets) == ["0000002_t2i_pretrain.png", "0000002_unified_edit.png"]
    assert all(set(text) == {"probe", "prompt", "answer", "truth"} and text["truth"] for text in texts)


@pytest.mark.slow
def test_training_does_not_notice(world: Path, alone: tuple, tmp_path: Path) -> None:
    history, _ = evaluated(world, tmp_path / "often", 1, eval_every=1, eval_pictures=0)
    assert numbers(history) == numbers(alone[1])


LAYOUTS = {
    "tp2-sp-pp2": (4, {**SP_TP2, PP: 2}),
    "pp2-vpp2": (2, {PP: 2, VPP: 2}),
    "cp2-dp2": (4, {CP: 2}),
    "dp2-overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "pp2-cp2": (4, {PP: 2, CP: 2}),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(LAYOUTS, "tp2-sp-pp2"))
def test_layouts_equal_one_process(world: Path, alone: tuple, tmp_path: Path, ranks: int, flags: dict) -> None:
    check(evaluated(world, tmp_path, ranks, **flags), tmp_path, alone)


@pytest.fixture(scope="module")
def sparse(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    folder = tmp_path_factory.mktemp("sparse")
    return folder, *evaluated(world, folder, 1, **SPARSE)


#: Replicas share experts in the first two: one of them has no question and passes along with the other, whose answers are longer.
EXPERT_LAYOUTS = {
    "ep2": (2, {EP: 2}),
    "ep2-pp2-vpp2-allgather": (4, {EP: 2, PP: 2, VPP: 2, "moe_token_dispatcher_type": "allgather"}),
    "ep2-tp2-sp": (2, {**SP_TP2, EP: 2, ETP: 1}),
}


@pytest.mark.parametrize(("ranks", "flags"), cases(EXPERT_LAYOUTS))
def test_layouts_that_divide_experts_equal_one_process(world: Path, sparse: tuple, tmp_path: Path, ranks: int, flags: dict) -> None:
    check(evaluated(world, tmp_path, ranks, **SPARSE, **flags), tmp_path, sparse)


def check(ours: tuple, tmp_path: Path, alone: tuple) -> None:
    """What was evaluated equals a run of one process: losses, texts and pictures."""
    history, (line,) = ours
    folder, reference, (expected,) = alone
    numbers_here = {name: value for name, value in line.items() if not name.startswith(("seconds", "run"))}
    assert numbers_here == pytest.approx(
        {name: value for name, value in expected.items() if not name.startswith(("seconds", "run"))}, rel=2e-5
    )
    for left, right in zip(history, reference, strict=True):
        names = [name for name in right if name.startswith(("ce/", "mse/"))]
        assert {name: left[name] for name in names} == pytest.approx({name: right[name] for name in names}, rel=1e-5)
    (sheets, texts), (their_sheets, their_texts) = samples(tmp_path), samples(folder)
    assert texts == their_texts and sheets.keys() == their_sheets.keys()
    for name, sheet in sheets.items():
        # Pixels are rounded down: values at an edge may fall to either side.
        assert np.abs(sheet - their_sheets[name]).max() <= 1, name
