# SPDX-License-Identifier: Apache-2.0
"""Damaged and foreign folders end a command with one sentence: nothing in them is executed, and nothing is written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_bagel.cli.convert import hf_to_megatron
from tests.checkpoint.hf.test_forms import FORMS, Trap, edit

WEIGHTS = "ema.safetensors"
QUERY = "language_model.model.layers.0.self_attn.q_proj.weight"


def _claims_too_much(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}}).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)


def _missing_shard(folder: Path) -> None:
    FORMS["several files with an index"](folder)
    next(folder.glob("ema-00002*")).unlink()


def _pickle(folder: Path) -> None:
    torch.save({"a": Trap(folder / "executed")}, folder / WEIGHTS)


def _interrupted(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / f"{WEIGHTS}.incomplete")


#: Form -> (how it is made, what the error says). docs/checkpoints.md has the same list.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "half downloaded": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:100_000]), "is not a complete safetensors file"
    ),
    "a download that did not end": (_interrupted, "a download did not end: ema.safetensors.incomplete"),
    "a header that claims more than the file": (_claims_too_much, "names tensors up to byte 4,194,3"),
    "an index that names a missing shard": (_missing_shard, "names files that do not exist"),
    "an index that names another folder": (
        lambda folder: (folder / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}'),
        "names files outside its folder",
    ),
    "a pickle with the name of safetensors": (_pickle, "is a PyTorch pickle"),
    "a web page": (lambda folder: (folder / WEIGHTS).write_text("<!doctype html>"), "is a web page"),
    "a Git LFS pointer": (
        lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer"
    ),
    "fp8 with scales": (
        lambda folder: edit(folder, lambda t: t.update({QUERY: t[QUERY].to(torch.float8_e4m3fn)})), "holds fp8 weights"
    ),
    "integers": (lambda folder: edit(folder, lambda t: t.update({QUERY: t[QUERY].to(torch.uint8)})), "quantized weights are not read"),
    "a weight that is not a number": (
        lambda folder: edit(folder, lambda t: t[QUERY].view(-1)[0].fill_(float("nan"))), f"tensor {QUERY} holds NaN or infinite values"
    ),
    "a layer that a config promises": (
        lambda folder: edit(folder, lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name]), "lacks "
    ),
    "no llm_config.json": (lambda folder: (folder / "llm_config.json").unlink(), "--llm_path"),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_a_bad_folder_is_refused_in_one_sentence(
    goldens: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(goldens / "hf", tmp_path / "hf"))
    make, reason = REFUSED[form]
    make(folder)
    assert hf_to_megatron.main(["--model", str(folder), "--output", str(tmp_path / "out"), "--weights", "ema"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-bagel convert hf-to-megatron: ")]
    assert len(lines) == 1 and reason in lines[0] and "make room" not in lines[0], lines
    assert not (folder / "executed").exists() and not list(tmp_path.glob("out/0*"))
