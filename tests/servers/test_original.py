# SPDX-License-Identifier: Apache-2.0
"""The original's own loading, made strict, takes every kind of export, and then computes the logits that we compute."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_bagel.checkpoint.convert_adapter import merge_adapter
from megatron_bagel.checkpoint.hf.folder import HFFolder, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.initial_weights import initial_value
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.load_engine import LoadOptions, load_engine
from megatron_bagel.model.positions import sincos_2d
from tests.checkpoint.hf.exported import export
from tests.cli.test_hub_models import peft_folder
from tests.servers.original_cpu import QUESTION, picture

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT, PYTHON = "MEGATRON_BAGEL_REFERENCE", "MEGATRON_BAGEL_RECORDER"
ROPE = "vit_model.vision_model.rope."


def _seeded(goldens: Path, out: Path, arch: BagelArch) -> Path:
    """Export a model with seeded weights."""
    entries, hf = WeightMap(arch).entries, goldens / "hf"
    file = WeightFile(lambda name: initial_value(entries[name], arch, 0))
    return write_folder(out, arch, {"ema": file}, sincos_2d, hf, hf / "ae.safetensors")


def exports(goldens: Path, folder: Path) -> list[Path]:
    """Every kind of export: untied, tied, with a rotary vision tower, and merged with an adapter."""
    arch = HFFolder(goldens / "hf").arch
    folders = [
        export(goldens, folder / "untied"),
        _seeded(goldens, folder / "tied", replace(arch, llm=replace(arch.llm, tie_word_embeddings=True))),
        _seeded(goldens, folder / "rotary", replace(arch, vit_rope=True)),
        merge_adapter(peft_folder(folder / "adapter"), goldens / "hf", folder / "merged", sincos_2d),
    ]
    autoencoder = json.loads((goldens / "hf/tiny_extra.json").read_text())["ae"]
    for exported in folders:
        (exported / "ae_config.json").write_text(json.dumps(autoencoder))
    return folders


def our_logits(folder: Path) -> torch.Tensor:
    engine = load_engine(folder, LoadOptions(dtype="fp32"))
    with torch.no_grad():
        contexts = engine.add_text(engine.add_features([Context()], [picture()]), [engine.tokenizer.encode(QUESTION)])
        return engine.next_logits(contexts, [engine.tokenizer.bos])[0][0]


def test_every_export_has_the_names_and_shapes_of_the_original(goldens: Path, tmp_path: Path) -> None:
    """``names_shapes.json`` is the original's state dict. A tied head is in it too, and a rotary tower trades a table for four."""
    recorded = {name: tuple(shape) for name, (shape, _, _) in json.loads((goldens / "names_shapes.json").read_text())["model"].items()}
    rotary = {name: shape for name, shape in recorded.items() if not name.endswith("embeddings.position_embedding.weight")}
    assert len(rotary) == len(recorded) - 1
    rotary |= {f"{ROPE}{part}_{axis}": (256, 8) for part in ("cos", "sin") for axis in "hw"}  # 16 x 16 patches, half a head of 16
    for folder in exports(goldens, tmp_path):
        shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "ema.safetensors").items()}
        assert shapes == (rotary if folder.name == "rotary" else recorded), folder.name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"{CHECKOUT} names no checkout of the original (tools/record_goldens/README.md)")
def test_the_original_loads_every_export_strictly(goldens: Path, tmp_path: Path) -> None:
    """``MEGATRON_BAGEL_RECORDER`` names the interpreter of the original's environment."""
    folders, out = exports(goldens, tmp_path), tmp_path / "logits.safetensors"
    python = os.environ.get(PYTHON) or str(shutil.which("python3"))
    words = ["-W", "ignore", "-m", "tests.servers.original_cpu", os.environ[CHECKOUT], str(out), *map(str, folders)]
    done = subprocess.run([python, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report, logits = json.loads(done.stdout.splitlines()[-1]), load_file(out)
    for folder in folders:
        tensors = len(load_file(folder / "ema.safetensors"))
        assert report[folder.name] == {"tensors": tensors, "names": [], "values": []}, folder.name
        torch.testing.assert_close(our_logits(folder), logits[folder.name], atol=1e-4, rtol=1e-4)
