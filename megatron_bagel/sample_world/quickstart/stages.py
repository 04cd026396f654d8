# SPDX-License-Identifier: Apache-2.0
"""The stages from nothing to an examined model, each done once: data, index, latents, training, export, exam."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_bagel.common.files import write_whole
from megatron_bagel.sample_world.assets import TRAIN_CONFIG
from megatron_bagel.sample_world.exam import Exam, picture_grid, write_exam
from megatron_bagel.sample_world.quickstart.commands import launched_command, module_command, run
from megatron_bagel.sample_world.quickstart.folders import QuickstartFolders
from megatron_bagel.sample_world.quickstart.progress import TrainingBar
from megatron_bagel.sample_world.world import read_world

EXAM = Exam(pictures=24, questions=8, edits=8)
_SAMPLES = ("--t2i", "3000", "--edit", "1500", "--vlm", "3000", "--captions-per-image", "1")
#: Sheets of held-out pictures during training, the same captions and edits each time.
_WATCHING = (
    "--split", "98,2", "--eval_every", "310", "--eval_samples", "8", "--eval_pictures", "3", "--eval_timesteps", "10",
    "--eval_cfg_text_scale", "3", "--eval_cfg_img_scale", "1", "--eval_answer_tokens", "8",
)  # fmt: skip
#: How the exam's pictures are drawn: the size and the shift they were learnt with.
DRAWING = (
    "--image-size", "64x64", "--num-timesteps", "25", "--timestep-shift", "1", "--cfg-text-scale", "3", "--cfg-img-scale", "1",
    "--cfg-interval", "0", "1", "--max-length", "12", "--vae-transform", "64", "64", "--vit-transform", "70", "70",
)  # fmt: skip
_LATENT_JOBS = 2
_LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class QuickstartSettings:
    """What a person may choose.

    Attributes:
        seed: Of data and weights.
        processes: Ranks that train.
        flags: Flags of ``megatron-bagel train``.
    """

    seed: int = 0
    processes: int = 2
    flags: tuple[str, ...] = ()


@dataclass
class Quickstart:
    """One run of the quickstart in one folder. ``seconds`` holds how long each stage that was done has taken."""

    folders: QuickstartFolders
    settings: QuickstartSettings
    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Do every stage whose result is not there yet. Raises CommandFailedError if one fails."""
        self._stage("sample data: pictures of coloured shapes with captions, questions and edits", self.folders.dataset, self._make_data)
        self._stage("index", self.folders.index / "manifest.json", self._build_index)
        self._stage("latents: the autoencoder's output for every picture", self.folders.latents / "latents.json", self._store_latents)
        self._stage(f"training on {self.settings.processes} process(es)", None, self._train)
        self._stage("export to a folder in BAGEL's released layout", self._exported(), self._export)
        self._stage("exam: pictures, answers and edits", self.folders.generated / "complete", self._examine)

    def _stage(self, title: str, result: Path | None, action: Callable[[], None]) -> None:
        began = time.monotonic()
        self.say(f"== {title}")
        if result is not None and result.exists():
            self.say(f"reusing {result.parent}")
            return
        action()
        self.seconds[title] = time.monotonic() - began

    def _make_data(self) -> None:
        seed = ("--seed", str(self.settings.seed))
        self._run("data", module_command("data", "sample", self.folders.data, *_SAMPLES, *seed))

    def _build_index(self) -> None:
        paths = ("--tokenizer", self.folders.data / "tokenizer", "--output", self.folders.index)
        self._run("index", module_command("data", "build", "--dataset_config_file", self.folders.dataset, *paths))

    def _store_latents(self) -> None:
        command = module_command("data", "latents", self.folders.index, "--dataset_config_file", self.folders.dataset)
        command += ["--vae", str(self.folders.autoencoder), "--output", str(self.folders.latents), "--num-jobs", str(_LATENT_JOBS)]
        self._run("latents", *([*command, "--job-index", str(job)] for job in range(_LATENT_JOBS)))

    def _train(self) -> None:
        data = ("--dataset_config_file", self.folders.dataset, "--index_dir", self.folders.index)
        parts = ("--llm_path", self.folders.data / "llm", "--vit_path", self.folders.data / "vit", "--vae_path", self.folders.autoencoder)
        runs = ("--results_dir", self.folders.results, "--checkpoint_dir", self.folders.checkpoints, "--auto_resume", "True")
        settings = ("--config", TRAIN_CONFIG, "--latent_cache", self.folders.latents, "--global_seed", str(self.settings.seed), *_WATCHING)
        command = launched_command(self.settings.processes, "train", *settings, *data, *parts, *runs, *self.settings.flags)
        with TrainingBar(self.folders.results, "training") as bar:
            self._run("training", command, watch=bar.update)

    def _export(self) -> None:
        step = self._newest_step()
        paths = ("--checkpoint", self.folders.checkpoints, "--output", self.folders.model)
        for folder in (self.folders.model, self.folders.generated):  # of an earlier step
            shutil.rmtree(folder, ignore_errors=True)
        self._run("export", module_command("convert", "megatron-to-hf", *paths, "--dtype", "fp32"))
        write_whole(self.folders.out / "model.step", step)

    def _examine(self) -> None:
        write_exam(read_world(self.folders.data / "world.json"), EXAM, self.folders.exam)
        paths = ("--model", self.folders.model, "--input", self.folders.exam / "prompts.jsonl", "--out", self.folders.generated)
        self._run("exam", module_command("generate", *paths, *DRAWING, "--batch-size", "24"), threads=2)
        picture_grid(self.folders.exam, self.folders.generated).save(self.folders.generated / "grid.png")
        (self.folders.generated / "complete").touch()

    def _run(self, name: str, *commands: Sequence[str], threads: int = 1, watch: Callable[[], None] | None = None) -> None:
        run(commands, self.folders.logs / f"{name}.txt", threads, watch)

    def _newest_step(self) -> str:
        return (self.folders.checkpoints / _LATEST).read_text(encoding="utf-8").strip()

    def _exported(self) -> Path | None:
        marker = self.folders.out / "model.step"
        is_current = marker.is_file() and marker.read_text(encoding="utf-8").strip() == self._newest_step()
        return self.folders.model / "ema.safetensors" if is_current else None
