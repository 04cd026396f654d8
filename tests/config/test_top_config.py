# SPDX-License-Identifier: Apache-2.0
"""A config.json that is broken, foreign or absent is told in one line and never stops a start."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from megatron_bagel.config.architecture import BagelArch

#: The file that is in circulation: 39 bytes that are not JSON.
RELEASED = b'{\n  "architectures": [\n    "Bagel"\n],}\n'


@pytest.fixture
def folder(goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(goldens / "hf", tmp_path / "hf"))


def _read(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[BagelArch, str]:
    """Return the model and the one line about config.json."""
    with caplog.at_level(logging.INFO):
        arch = BagelArch.from_hf_folder(folder)
    (line,) = (record.getMessage() for record in caplog.records if "config.json" in record.getMessage())
    return arch, line


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (RELEASED, "config.json is not valid JSON"),
        (b"", "config.json is not valid JSON"),
        (b"\xff\xfe\x00", "config.json"),
        (b"[]", "holds a list"),
        (b'{"model_type": "qwen2", "hidden_size": 3584, "architectures": ["Qwen2ForCausalLM"]}', "has no settings of BAGEL"),
        (None, "has no config.json"),
    ],
)
def test_a_config_that_says_nothing_is_told_and_ignored(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, reason: str
) -> None:
    whole = BagelArch.from_hf_folder(folder)
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    arch, line = _read(folder, caplog)
    assert reason in line and str(folder) in line
    assert (arch.llm, arch.vit, arch.autoencoder) == (whole.llm, whole.vit, whole.autoencoder)
    assert arch.vit_max_num_patch_per_side == whole.vit_max_num_patch_per_side


def test_the_file_in_circulation_has_39_bytes() -> None:
    assert len(RELEASED) == 39


def test_values_that_cannot_be_used_are_told_and_the_others_count(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    top = json.loads((folder / "config.json").read_text())
    wrong = {"latent_patch_size": "2", "visual_gen": "yes", "vit_max_num_patch_per_side": 0, "timestep_shift": 3}
    (folder / "config.json").write_text(json.dumps({**top, **wrong}))
    arch, line = _read(folder, caplog)
    assert "latent_patch_size '2'" in line and "visual_gen 'yes'" in line and "vit_max_num_patch_per_side 0" in line
    assert (arch.latent_patch_size, arch.timestep_shift, arch.max_latent_size) == (2, 3, 16)
    assert arch.autoencoder is not None


def test_the_line_comes_once_and_from_one_rank(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.json").write_bytes(RELEASED)
    monkeypatch.setenv("RANK", "1")
    BagelArch.from_hf_folder(folder)
    assert not caplog.records
    monkeypatch.setenv("RANK", "0")
    for _ in range(2):
        BagelArch.from_hf_folder(folder)
    assert len(caplog.records) == 1
