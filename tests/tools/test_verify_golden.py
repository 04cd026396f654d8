# SPDX-License-Identifier: Apache-2.0
"""The checker passes on this code, covers everything recorded, and fails when a number, a weight or a case is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bagel import platform
from tests.distributed import run_ranks
from tests.tools.recorded_set import write_recorded_set
from tools import verify_golden
from tools.golden_cases import TrainCases
from tools.golden_common import CaseResult
from tools.golden_model import GoldenModel
from tools.golden_modules import run_module_cases
from tools.golden_optimizer import start
from tools.golden_train import train_results


def linked(goldens: Path, to: Path, *own: str) -> Path:
    """The goldens under ``to`` by links, except for the files ``own``, which are left out."""
    for source in goldens.rglob("*"):
        name = source.relative_to(goldens)
        if source.is_dir():
            (to / name).mkdir(parents=True, exist_ok=True)
        elif str(name) not in own:
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).symlink_to(source)
    return to


def by_name(results: list[CaseResult]) -> dict[str, CaseResult]:
    return {result.name: result for result in results}


def test_everything_recorded_is_within_tolerance(goldens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_golden.main(["--goldens", str(goldens)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "all within tolerance" in lines[-1]
    named = {line.split()[1] for line in lines[:-1]}
    for folder, file in (("train", "train/expected.json"), ("infer", "infer/infer.json")):
        assert {f"{folder}/{case}" for case in json.loads((goldens / file).read_text())} <= named
    assert {f"modules/{name.split('.')[0]}" for name in load_file(goldens / "modules.safetensors")} <= named
    assert sum(line.startswith("--") for line in lines) == 2 and lines[-1].endswith("2 not covered")  # TaylorSeer


def test_wrong_numbers_and_unknown_cases_fail(goldens: Path, tmp_path: Path, single_rank: None) -> None:
    folder = linked(goldens, tmp_path, "train/expected.json", "modules.safetensors")
    recorded = json.loads((goldens / "train" / "expected.json").read_text())
    recorded = {name: recorded[name] for name in ("flex_0", "freeze_vit", "lr_used_at_step", "optim_base", "flops", "hidden_tokens")}
    gradients = recorded["flex_0"]["grads"]["per_param"]
    gradients["language_model.model.layers.3.self_attn.k_proj_moe_gen.bias"]["norm"] *= 1 + 3e-4
    recorded["freeze_vit"]["nonzero_grad"].pop("connector.fc1.weight")
    recorded["lr_used_at_step"]["cosine"][7] *= 1.001
    recorded["optim_base"]["ema_norms"]["language_model.lm_head.weight"] *= 1 + 3e-4
    recorded["a_new_case"] = {}
    (folder / "train" / "expected.json").write_text(json.dumps(recorded))
    modules = load_file(goldens / "modules.safetensors")
    modules["vit.layer_0"][3, 5] += 1e-3
    save_file({**modules, "new.tensor": torch.zeros(1)}, folder / "modules.safetensors")

    model = GoldenModel(folder)
    cases = TrainCases(folder, model)
    results = by_name([*train_results(cases), *run_module_cases(folder, model, cases.parts)])
    failed = {name: result.detail for name, result in results.items() if not result.ok}
    in_training = {f"train/{name}" for name in ("flex_0", "freeze_vit", "lr_used_at_step", "optim_base", "a_new_case")}
    assert set(failed) == in_training | {"modules/vit", "modules/unknown"}
    assert "k_proj_moe_gen.bias" in failed["train/flex_0"] and "connector.fc1.weight" in failed["train/freeze_vit"]
    assert "new.tensor" in failed["modules/unknown"] and "layer_0" in failed["modules/vit"]


def test_a_wrong_weight_is_noticed(goldens: Path, tmp_path: Path, single_rank: None) -> None:
    """One matrix of one layer, off by a tenth of a percent."""
    folder = linked(goldens, tmp_path, "hf/ema.safetensors")
    weights = {name: tensor.float() for name, tensor in load_file(goldens / "hf" / "ema.safetensors").items()}
    weights["language_model.model.layers.2.mlp_moe_gen.up_proj.weight"] *= 1.001
    save_file(weights, folder / "hf" / "ema.safetensors")
    cases = TrainCases(folder, GoldenModel(folder))
    cases.expected = {name: cases.expected[name] for name in ("flex_0", "hidden_tokens", "Qwen2DecoderLayer")}
    results = by_name(list(train_results(cases)))
    assert not results["train/flex_0"].ok and not results["train/hidden_tokens"].ok
    assert results["train/Qwen2DecoderLayer"].ok  # it has no generation weights


def test_another_model_size(tmp_path: Path, single_rank: None) -> None:
    folder = write_recorded_set(tmp_path)
    cases = TrainCases(folder, GoldenModel(folder))
    assert [result.line() for result in train_results(cases) if not result.ok] == []
    cases.expected["flex_0"]["losses"]["mse"] *= 1.001
    assert [result.name for result in train_results(cases) if not result.ok] == ["train/flex_0"]


def _rank_step(goldens: Path) -> tuple[float, float, float]:
    """A step of this rank's batch as one of two replicas."""
    cases = TrainCases(goldens, GoldenModel(goldens))
    run = start(cases, cases.expected["optim_base"])
    result = run.step(cases, f"flex_{torch.distributed.get_rank()}")
    return result.losses.ce, result.losses.mse, result.outcome.grad_norm


@pytest.mark.distributed
def test_two_real_ranks_equal_the_recorded_two(goldens: Path) -> None:
    """The checker sums two microbatches in one process; replicas of the distributed optimizer come to the same."""
    recorded = json.loads((goldens / "train" / "expected.json").read_text())["two_ranks"]
    expected = (recorded["logged_ce"], recorded["logged_mse"], recorded["grads_averaged"]["total_norm"])
    for seen in run_ranks(_rank_step, 2, goldens, parallel={}):
        assert seen == pytest.approx(expected, rel=1e-5)


def test_without_goldens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_golden.main(["--goldens", str(tmp_path)]) == 2
    assert "expected.json" in capsys.readouterr().err


@pytest.mark.skipif(platform.has_gpu(), reason="flex is for GPUs")
@pytest.mark.parametrize("backend", ["flex", "flex_flash"])
def test_flex_is_refused_on_a_cpu(goldens: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    assert verify_golden.main(["--goldens", str(goldens), "--attention-backend", backend]) == 2
    assert f"--attention-backend {backend} has no backward" in capsys.readouterr().err


@pytest.mark.slow
def test_another_backend_is_used(goldens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify_golden.main(["--goldens", str(goldens), "--attention-backend", "dense"]) == 0
    assert "all within tolerance" in capsys.readouterr().out
