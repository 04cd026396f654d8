# SPDX-License-Identifier: Apache-2.0
"""Where a run starts, decided from its settings and from what is on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.assembly.opened_model import checkpoint_at
from megatron_bagel.assembly.starting_weights import InitialSettings, StartSettings, WeightSource, average_source, weight_source

PRETRAINED = InitialSettings(seed=7, llm="qwen", vit=None)


def settings(folder: Path, **changes: Any) -> StartSettings:
    values = {
        "checkpoint_dir": folder / "checkpoints", "auto_resume": True, "resume_from": None, "model_only": False, "from_ema": False,
        "verify": True, "initial": PRETRAINED,
    }  # fmt: skip
    return StartSettings(**{**values, **changes})


def model_folder(folder: Path, *weights: str) -> Path:
    """A folder whose JSON cannot be read: who only wants its weights does not read it."""
    folder.mkdir()
    (folder / "llm_config.json").write_text("no JSON")
    for kind in weights:
        (folder / f"{kind}.safetensors").touch()
    return folder


def test_a_run_without_anything_to_continue_starts_from_its_pretrained_parts(tmp_path: Path) -> None:
    source = weight_source(settings(tmp_path))
    assert source == WeightSource()
    assert source.describe(PRETRAINED) == "starting from qwen and no ViT"
    assert source.describe(InitialSettings(seed=7, llm=None, vit=None)) == "starting from random weights (--init_random, seed 7)"


@pytest.mark.parametrize(
    ("kinds", "from_ema", "expected", "average"),
    [
        (("ema",), False, "ema", None),
        (("model",), False, "model", None),
        (("ema", "model"), False, "model", "ema"),
        (("ema", "model"), True, "ema", None),
    ],
)
def test_a_model_folder_gives_the_weights_that_were_asked_for(
    tmp_path: Path, kinds: tuple[str, ...], from_ema: bool, expected: str, average: str | None
) -> None:
    folder = model_folder(tmp_path / "model", *kinds)
    source = weight_source(settings(tmp_path, resume_from=folder, model_only=True, from_ema=from_ema))
    assert source == WeightSource(folder=folder, weights=expected)
    assert average_source(source) == average


def test_a_weight_file_of_another_name_is_named_by_flag(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "ema_bf16")
    (folder / "llm_config.json").unlink()  # as the original's trainer leaves it
    start = settings(tmp_path, resume_from=folder, model_only=True, weights_name="ema_bf16.safetensors")
    source = weight_source(start)
    assert source == WeightSource(folder=folder, weights="ema", weights_name="ema_bf16.safetensors")
    assert source.describe(PRETRAINED) == f"starting from the ema weights of {folder}/ema_bf16.safetensors"
    assert average_source(source) is None
    with pytest.raises(ValueError, match=r"other files of weights: ema_bf16\.safetensors"):
        weight_source(replace(start, weights_name="gone.safetensors"))


def test_a_model_folder_is_nothing_to_resume(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", "ema")
    with pytest.raises(ValueError, match="Pass --resume_model_only True"):
        weight_source(settings(tmp_path, resume_from=folder))


def test_what_is_neither_a_checkpoint_nor_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert checkpoint_at(tmp_path / "empty") is None and checkpoint_at(tmp_path / "nowhere") is None
    with pytest.raises(ValueError, match=r"there is no file .*empty/llm_config.json"):
        weight_source(settings(tmp_path, resume_from=tmp_path / "empty", model_only=True))
