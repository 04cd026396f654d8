# SPDX-License-Identifier: Apache-2.0
"""A run starts from the weights of a folder as the original's trainer leaves it, and from one whose config.json is broken."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_bagel.cli.convert import megatron_to_hf
from tests.checkpoint.hf.test_forms import FORMS
from tests.runs import make_world, run, run_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_both_forms_start_as_the_whole_folder_does(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    run(run_config(world, tmp_path / "first", total_steps=2))
    whole, broken, trained = (tmp_path / name for name in ("whole", "broken", "trained"))
    export = ["--checkpoint", str(tmp_path / "first/checkpoints"), "--output", str(whole), "--weights", "both", "--dtype", "fp32"]
    assert megatron_to_hf.main(export) == 0
    shutil.copytree(whole, broken)
    (broken / "config.json").write_text('{"architectures": ["Bagel"],}')
    trained.mkdir()
    for kind in ("model", "ema"):
        shutil.copy(whole / f"{kind}.safetensors", trained / f"{kind}_fp32.safetensors")
    start = {"init_random": False, "resume_model_only": True, "total_steps": 1}
    hf = {"finetune_from_hf": True, "finetune_from_ema": True}
    losses = {
        whole: run(run_config(world, tmp_path / "a", model_path=str(whole), resume_from=str(whole), **start, **hf)),
        broken: run(run_config(world, tmp_path / "b", model_path=str(broken), resume_from=str(broken), **start, **hf)),
        trained: run(run_config(world, tmp_path / "c", resume_from=str(trained), weights_name="ema_fp32.safetensors", **start)),
    }
    assert losses[whole][0]["ce"] > 0
    for folder in (broken, trained):
        assert [losses[folder][0][name] for name in ("ce", "mse")] == [losses[whole][0][name] for name in ("ce", "mse")]


#: These change sizes that only the goldens' model has.
OTHER_MODELS = ("another image size stated", "used ViT layers alone stated")


def test_every_form_has_the_losses_of_the_plain_folder(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    run(run_config(world, tmp_path / "first", total_steps=1))
    whole = tmp_path / "whole"
    assert megatron_to_hf.main(["--checkpoint", str(tmp_path / "first/checkpoints"), "--output", str(whole), "--dtype", "fp32"]) == 0
    (whole / "model.safetensors.index.json").unlink()
    start = {"init_random": False, "resume_model_only": True, "total_steps": 1, "finetune_from_hf": True, "finetune_from_ema": True}
    losses: dict[str, list[float]] = {}
    for number, form in enumerate(name for name in FORMS if name not in OTHER_MODELS):
        folder = Path(shutil.copytree(whole, tmp_path / f"{number}/model"))
        FORMS[form](folder)
        # Some forms have other weights than averages, or no autoencoder.
        changes = {"finetune_from_ema": False} if form.startswith("model.safetensors") else {}
        if not (folder / "ae.safetensors").exists():
            shutil.copy(whole / "ae.safetensors", folder)
        config = run_config(world, tmp_path / f"{number}/run", model_path=str(folder), resume_from=str(folder), **{**start, **changes})
        losses[form] = [run(config)[0][name] for name in ("loss", "ce", "mse")]
    plain = losses.pop("as released")
    assert len(losses) > 10 and {form: values for form, values in losses.items() if values != plain} == {}
