# SPDX-License-Identifier: Apache-2.0
"""The generation command on a GPU: in fp32 the pictures and texts of a CPU, and in bf16, its default there, pictures at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.gpu.commands import run
from tests.inference.tiny_model import write_tiny_model

QUICK = ["--num-timesteps", "6", "--vae-transform", "32", "16", "--vit-transform", "42", "14", "--max-length", "6"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model folder, and a file that asks for a picture, a change and an answer."""
    folder = tmp_path_factory.mktemp("model")
    model = write_tiny_model(folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / "photo.png")
    lines = [
        {"id": "drawn", "prompt": "a red circle", "size": [32, 24]},
        {"id": "changed", "task": "edit", "prompt": "make the square blue", "image": "photo.png"},
        {"id": "said", "task": "understand", "prompt": "what color is it?", "image": "photo.png"},
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return ["--model", str(model), "--input", str(folder / "prompts.jsonl"), *QUICK]


def answers(out: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    pictures = {line["id"]: np.asarray(Image.open(out / line["image"])).astype(int) for line in lines if "image" in line}
    return pictures, {line["id"]: line["text"] for line in lines if "text" in line}


def test_fp32_equals_the_cpu(asked: list[str], tmp_path: Path) -> None:
    run("megatron_bagel.generate", *asked, "--out", str(tmp_path / "cpu"), gpu=False)
    run("megatron_bagel.generate", *asked, "--dtype", "fp32", "--out", str(tmp_path / "gpu"))
    (theirs, said), (ours, we_said) = answers(tmp_path / "cpu"), answers(tmp_path / "gpu")
    assert said == we_said and ours.keys() == theirs.keys() == {"drawn", "changed"}
    # TF32 is on in a user's run: convolutions of the autoencoder round to ten bits.
    assert all(np.abs(ours[name] - theirs[name]).max() <= 3 for name in ours)


def test_a_captured_graph_writes_the_same_text(asked: list[str], tmp_path: Path) -> None:
    run("megatron_bagel.generate", *asked, "--dtype", "fp32", "--out", str(tmp_path / "growing"))
    run("megatron_bagel.generate", *asked, "--dtype", "fp32", "--static-cache", "--out", str(tmp_path / "graph"))
    assert answers(tmp_path / "graph")[1] == answers(tmp_path / "growing")[1]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_captured_steps_draw_the_same_pictures(asked: list[str], tmp_path: Path, dtype: str) -> None:
    """Steps before, within and after guidance, of pictures of two sizes and of several contexts in one batch."""
    steps = ["--dtype", dtype, "--num-timesteps", "40", "--cfg-interval", "0.3", "0.95"]
    run("megatron_bagel.generate", *asked, *steps, "--out", str(tmp_path / "launched"))
    said = run("megatron_bagel.generate", *asked, *steps, "--capture-steps", "--out", str(tmp_path / "captured"))
    assert "replay no graphs" not in said
    launched, captured = answers(tmp_path / "launched")[0], answers(tmp_path / "captured")[0]
    assert launched.keys() == captured.keys() == {"drawn", "changed"}
    assert all(np.abs(captured[name] - launched[name]).max() <= 1 for name in launched)


def test_bf16(asked: list[str], tmp_path: Path) -> None:
    run("megatron_bagel.generate", *asked, "--out", str(tmp_path))
    pictures, texts = answers(tmp_path)
    assert {name: picture.shape for name, picture in pictures.items()} == {"drawn": (32, 24, 3), "changed": (24, 32, 3)}
    assert all(picture.std() > 0 for picture in pictures.values()) and texts.keys() == {"said"}
