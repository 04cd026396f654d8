# SPDX-License-Identifier: Apache-2.0
"""Every other flag that takes a model on a hub does what the folder does, and a name that does not fit it ends in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_bagel.cli.convert import megatron_to_hf
from megatron_bagel.common.folder_files import TOKENIZER_FILES
from megatron_bagel.config.parser import Config
from megatron_bagel.training.observability.metrics_file import read_history
from tests.hub_server import Hub, running_hub
from tests.runs import make_world, run, run_config

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
NAME = "owner/small"
#: Runs every command line of a list in one process; prints the statuses. A run ends by SystemExit once its ranks have met.
DRIVER = """
import json, sys
from megatron_bagel.cli.main import main

def status(words):
    try:
        return main(words)
    except SystemExit as end:
        return end.code

print(json.dumps([status(words) for words in json.loads(sys.argv[1])]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample data, an exported ``model``, and the same model without an autoencoder, ``bare``."""
    world = make_world(tmp_path_factory.mktemp("world"))
    run(run_config(world, world / "first", total_steps=2))
    export = ["--checkpoint", str(world / "first/checkpoints"), "--output", str(world / "model"), "--dtype", "fp32"]
    assert megatron_to_hf.main(export) == 0
    shutil.copytree(world / "model", world / "bare", ignore=shutil.ignore_patterns("ae.safetensors", "ae_config.json"))
    (world / "questions.jsonl").write_text(json.dumps({"tag": "colors", "include": [], "prompt": "a red circle"}) + "\n")
    return world


@pytest.fixture
def hub(world: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.add(NAME, world / "model")
        hub.add("owner/bare", world / "bare")
        yield hub


def commands(hub: Hub, cache: Path, lines: list[list[str]]) -> tuple[list[int], list[str]]:
    """The statuses, and the lines on stderr that name a command."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(lines)], env={**hub.environment(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), [line for line in done.stderr.splitlines() if line.startswith("megatron-bagel ")]


def drawing(world: Path, autoencoder: str, out: Path) -> list[list[str]]:
    """Command lines that take an autoencoder: a cache of latents, a picture, the answers to a benchmark."""
    picture = ["--model", str(world / "bare"), "--autoencoder", autoencoder, "--image-size", "16x16", "--num-timesteps", "3"]
    data = [str(world / "index"), "--dataset_config_file", str(world / "data/dataset.yaml")]
    return [
        ["data", "latents", *data, "--vae", autoencoder, "--output", str(out / "latents")],
        ["generate", *picture, "--prompt", "a red circle", "--out", str(out / "pictures")],
        ["evaluate", "geneval", str(world / "questions.jsonl"), *picture, "--num-samples", "1", "--out", str(out / "answers")],
    ]


def made(out: Path) -> dict[str, bytes]:
    """Every picture and every stored latent."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.suffix in (".png", ".bin", ".idx")}


def test_an_autoencoder_comes_from_a_hub(world: Path, hub: Hub, tmp_path: Path) -> None:
    by_name, by_folder = drawing(world, NAME, tmp_path / "name"), drawing(world, str(world / "model/ae.safetensors"), tmp_path / "folder")
    wrong = [*drawing(world, "owner/bare", tmp_path / "wrong"), *drawing(world, "owner/smal", tmp_path / "typo")]
    statuses, errors = commands(hub, tmp_path / "cache", [*by_name, *by_folder, *wrong])
    assert statuses == [0] * 6 + [2] * 6
    names = ["data latents", "generate", "evaluate"] * 2
    flags = ["--vae", "--autoencoder", "--autoencoder"] * 2
    for name, flag, error in zip(names, flags, errors, strict=True):
        assert error.startswith(f"megatron-bagel {name}: {flag}"), error
    assert all("owner/bare has no ae.safetensors" in error for error in errors[:3]), errors
    assert all("has no model owner/smal: check the spelling" in error for error in errors[3:]), errors
    pictures = made(tmp_path / "name")
    assert len(pictures) >= 4 and pictures == made(tmp_path / "folder")
    downloads = set(hub.downloads())
    assert {name for name in downloads if name.endswith(".safetensors")} == {"ae.safetensors"} and downloads.isdisjoint(TOKENIZER_FILES)


def train_words(config: Config, **settings: str) -> list[str]:
    values = {name: config.value_of(name) for name in config.given} | settings
    return ["train", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def test_the_base_of_adapters_comes_from_a_hub(world: Path, hub: Hub, tmp_path: Path) -> None:
    """The base has moved: a run that continues takes it from the hub and goes on as it would have with the folder."""
    base = Path(shutil.copytree(world / "model", tmp_path / "base"))
    start = {
        "resume_from": str(base),
        "resume_model_only": True,
        "finetune_from_ema": True,
        "init_random": False,
        "lora_rank": 2,
        "lr": 1e-2,
    }
    losses = {}
    for name in ("folder", "name"):
        run(run_config(world, tmp_path / name, total_steps=2, **start))
    run(again := run_config(world, tmp_path / "folder", total_steps=4, **start))
    losses["folder"] = [step["loss"] for step in read_history(tmp_path / "folder/metrics.jsonl")]
    base.rename(tmp_path / "moved")
    results = {"resume_from": f"{NAME}@main", "results_dir": str(tmp_path / "name"), "checkpoint_dir": str(tmp_path / "name/checkpoints")}
    lines = [train_words(again, **results, lora_base=name) for name in ("owner/bare", "owner/smal", f"{NAME}@main")]
    hub.add("owner/bare", world / "data/tokenizer")
    statuses, errors = commands(hub, tmp_path / "cache", lines)
    assert statuses == [2, 2, 0], errors
    assert "--lora_base: owner/bare has no" in errors[0] and "has no model owner/smal: check the spelling" in errors[1]
    losses["name"] = [step["loss"] for step in read_history(tmp_path / "name/metrics.jsonl")]
    assert len(losses["name"]) == 4 and losses["name"] == losses["folder"]
