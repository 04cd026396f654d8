# SPDX-License-Identifier: Apache-2.0
"""The phases of the product's work on a tiny world, each a command with an output folder, and what each gives undisturbed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.commands import Ended, start
from tests.runs import SIZES
from tools.compare_runs import compare
from tools.compare_values import Rule

STEPS = 4
SECONDS = "seconds.json"  # of each phase, undisturbed; written last
LIMIT = 180.0  # seconds: a command that takes longer hangs
TRAINING = {
    "init_random": True, "vit_max_num_patch_per_side": 10, "max_latent_size": 4, "max_num_tokens": 320, "expected_num_tokens": 256,
    "max_num_tokens_per_sample": 256, "num_workers": 0, "lr": 1e-3, "warmup_steps": 2, "total_steps": STEPS, "log_every": 1,
    "save_every": 2, "global_batch_size": 2, "ema": 0.9, "auto_resume": True,
}  # fmt: skip
#: What has to be equal in the end, where that is not the whole output.
RESULTS = {"train": ("metrics.jsonl", f"checkpoints/{STEPS:07d}"), "generate": ("results.jsonl", "00000.png", "00001.png")}


@dataclass
class World:
    """Where the artefacts lie. A fault replaces one of them by a damaged copy; ``undisturbed`` holds each phase's right output."""

    folder: Path
    data: Path
    index: Path
    latents: Path
    checkpoints: Path
    model: Path
    undisturbed: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> World:
        """The world below a folder, in which each phase reads what the phase before it wrote."""
        right = folder / "undisturbed"
        return cls(folder, folder / "data", right / "build", right / "latents", right / "train/checkpoints", right / "export", right)

    def words(self, phase: str, output: Path) -> list[str]:
        """The command line of a phase that writes to ``output``."""
        return _WORDS[phase](self, output)

    def run(self, phase: str, output: Path, log: Path, limit: float = LIMIT) -> Ended:
        """Run a phase to its end."""
        return start(self.words(phase, output), log, limit).wait()

    def differences(self, phase: str, output: Path) -> list[str]:
        """What a phase's output differs in from the undisturbed one."""
        parts = RESULTS.get(phase, ("",))
        if missing := [part for part in parts if not (output / part).exists()]:
            return [f"{part or output.name} is not there" for part in missing]
        pairs = [(self.undisturbed / phase / part, output / part) for part in parts]
        if phase == "generate":
            return [f"{right.name} differs" for right, path in pairs if right.read_bytes() != path.read_bytes()]
        rule = Rule(bitwise=True, tolerance=0.0)
        try:
            tallies = [tally for pair in pairs for tally in compare(*pair, rule)]
        except (ValueError, OSError) as error:
            return [str(error)]
        return [tally.sentence(rule) for tally in tallies if not tally.equal]


def open_world(folder: Path) -> World:
    """Return the world below a folder, which is made there if there is none."""
    noted = folder / SECONDS
    if not noted.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # the beginning of one whose making was interrupted
        return make_world(folder)
    world = World.of(folder)
    world.seconds |= json.loads(noted.read_text())
    return world


def make_world(folder: Path) -> World:
    """Make the world and run every phase once, undisturbed."""
    world = World.of(folder)
    counts = ["--t2i", "24", "--edit", "16", "--vlm", "16", "--text", "8"]
    folder.mkdir(parents=True, exist_ok=True)
    expect_success(start(["data", "sample", str(world.data), *counts, *SIZES], folder / "sample", LIMIT).wait(), "data sample")
    write_autoencoder(folder / "ae.safetensors")
    world.undisturbed.mkdir()
    for phase in PHASES:
        begin = time.monotonic()
        output = world.undisturbed / phase
        expect_success(world.run(phase, output, folder / phase), phase)
        world.seconds[phase] = time.monotonic() - begin
    (folder / SECONDS).write_text(json.dumps(world.seconds))
    return world


def write_autoencoder(path: Path) -> None:
    """Random weights, which serve as well as trained ones here."""
    import torch

    from megatron_bagel.encoders.autoencoder import AutoEncoder
    from megatron_bagel.encoders.autoencoder_io import save_autoencoder
    from tests.runs import AUTOENCODER

    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AUTOENCODER), path)


def expect_success(ended: Ended, name: str) -> None:
    """Raise RuntimeError if an undisturbed command failed."""
    if ended.status != 0:
        raise RuntimeError(f"undisturbed, {name} ended with {ended.status}:\n{ended.text[-3000:]}")


def _build(world: World, output: Path) -> list[str]:
    settings = ["--dataset_config_file", str(world.data / "dataset.yaml"), "--tokenizer", str(world.data / "tokenizer")]
    return ["data", "build", *settings, "--output", str(output), "--rows_per_shard", "10"]


def _verify(world: World, output: Path) -> list[str]:
    return ["data", "verify", str(world.index)]


def _latents(world: World, output: Path) -> list[str]:
    settings = ["--dataset_config_file", str(world.data / "dataset.yaml"), "--vae", str(world.folder / "ae.safetensors")]
    return ["data", "latents", str(world.index), *settings, "--output", str(output)]


def _train(world: World, output: Path) -> list[str]:
    flags = {
        **TRAINING, "llm_path": world.data / "llm", "vit_path": world.data / "vit", "vae_path": world.folder / "ae.safetensors",
        "tokenizer_path": world.data / "tokenizer", "dataset_config_file": world.data / "dataset.yaml", "index_dir": world.index,
        "latent_cache": world.latents, "results_dir": output, "checkpoint_dir": output / "checkpoints",
    }  # fmt: skip
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


def _export(world: World, output: Path) -> list[str]:
    return ["convert", "megatron-to-hf", "--checkpoint", str(world.checkpoints), "--output", str(output), "--dtype", "fp32"]


def _convert(world: World, output: Path) -> list[str]:
    return ["convert", "hf-to-megatron", "--model", str(world.model), "--output", str(output)]


def _generate(world: World, output: Path) -> list[str]:
    sizes = ["--image-size", "32x32", "--vae-transform", "64", "64", "--vit-transform", "70", "70"]
    sampling = ["--num-timesteps", "3", "--timestep-shift", "1", "--max-length", "6"]
    return [
        "generate",
        "--model",
        str(world.model),
        *sizes,
        *sampling,
        "--prompt",
        "a red circle",
        "--prompt",
        "two squares",
        "--out",
        str(output),
    ]


_WORDS: dict[str, Callable[[World, Path], list[str]]] = {
    "build": _build, "latents": _latents, "train": _train, "export": _export, "convert": _convert, "generate": _generate,
    "verify": _verify,
}  # fmt: skip
#: The phases in order; "verify" reads every byte of an index and writes nothing.
PHASES = ("build", "latents", "train", "export", "convert", "generate")
