# SPDX-License-Identifier: Apache-2.0
"""The stages from nothing to an examined model, each done once: data, index, latents, two lessons, export, exam, report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_bagel.common.files import write_whole
from megatron_bagel.common.yaml_files import read_yaml
from megatron_bagel.sample_world.assets import PICTURES_CONFIG, QUESTIONS_CONFIG
from megatron_bagel.sample_world.exam import Exam, picture_grid, write_exam
from megatron_bagel.sample_world.folders import write_yaml
from megatron_bagel.sample_world.quickstart.commands import launched_command, module_command, run
from megatron_bagel.sample_world.quickstart.folders import QuickstartFolders
from megatron_bagel.sample_world.quickstart.progress import TrainingBar
from megatron_bagel.sample_world.world import read_world

#: A group's weight, or its weights over the steps.
Weight = float | Mapping[int, float]
#: What the exam asks. Half of its pictures show pairs of colour and shape that training never did.
EXAM = Exam(pictures=48, questions=16, edits=24)
#: A third of a picture's side is one latent token and one patch of the vision tower, so each of the nine places is one token of both.
#: The decoder starts from half the default deviation (docs/small_world.md).
_WORLD = (
    "--image-size", "48", "--vit-image-size", "42", "--layers", "4", "--initializer-range", "0.031",
    "--hold-out", "red:square", "green:circle", "purple:triangle", "cyan:cross",
)  # fmt: skip
_SAMPLES = (
    "--t2i", "2000", "--edit", "2000", "--vlm", "2000", "--captions-per-image", "1",
    "--questions-per-image", "3", "--question-kinds", "colour", "shape", "position",
    "--edit-kinds", "recolour-all", "--edit-max-count", "9",
)  # fmt: skip
#: Groups of ``dataset.yaml`` that each lesson draws from, with their weights.
_QUESTIONS: dict[str, Weight] = {"vlm_sft": 1.0}
#: Edits come first: to keep a picture, each place must learn to look at the same place of it. Edited pictures are full of shapes, so that
#: every place gains from that (docs/small_world.md).
_PICTURES: dict[str, Weight] = {"t2i_pretrain": {0: 0.05, 300: 0.05, 400: 2.0}, "unified_edit": 1.0}
#: How the exam's pictures are drawn: the size and the shift they were learnt with.
DRAWING = (
    "--image-size", "48x48", "--num-timesteps", "13", "--timestep-shift", "3", "--cfg-text-scale", "3", "--cfg-img-scale", "1",
    "--cfg-interval", "0", "1", "--max-length", "12", "--vae-transform", "48", "48", "--vit-transform", "42", "42",
)  # fmt: skip
_LATENT_JOBS = 2
_LATEST = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class QuickstartSettings:
    """What a person may choose.

    Attributes:
        seed: Of data and weights.
        processes: Ranks that train.
        question_steps: Steps of the first lesson; None for those of its settings.
        flags: Flags of ``megatron-bagel train`` for the second lesson.
    """

    seed: int = 0
    processes: int = 2
    question_steps: int | None = None
    flags: tuple[str, ...] = ()


def lesson(dataset: Mapping[str, Any], weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Return the dataset config with only the groups in ``weights``, drawn by these weights alone."""
    groups = {name: {**dataset[name], "weight": weight, "is_mandatory": False} for name, weight in weights.items()}
    return {**groups, "dataset_info": {name: dataset["dataset_info"][name] for name in groups}}


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
        self._stage(
            f"first lesson: questions, on {self.settings.processes} process(es)",
            self._latest(self.folders.questions),
            self._teach_questions,
        )
        self._stage("second lesson: pictures and edits; what was learnt is kept", None, self._teach_pictures)
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
        self._run("data", module_command("data", "sample", self.folders.data, *_WORLD, *_SAMPLES, *seed))

    def _build_index(self) -> None:
        paths = ("--tokenizer", self.folders.data / "tokenizer", "--output", self.folders.index)
        self._run("index", module_command("data", "build", "--dataset_config_file", self.folders.dataset, *paths))

    def _store_latents(self) -> None:
        command = module_command("data", "latents", self.folders.index, "--dataset_config_file", self.folders.dataset)
        command += ["--vae", str(self.folders.autoencoder), "--output", str(self.folders.latents), "--num-jobs", str(_LATENT_JOBS)]
        self._run("latents", *([*command, "--job-index", str(job)] for job in range(_LATENT_JOBS)))

    def _teach_questions(self) -> None:
        steps = str(self.settings.question_steps or 0)
        shorter = () if steps == "0" else ("--total_steps", steps, "--save_every", steps, "--warmup_steps", "1")
        self._train(self.folders.questions / "results", "questions", _QUESTIONS, "--config", QUESTIONS_CONFIG,
                    "--checkpoint_dir", self.folders.questions / "checkpoints", *shorter)  # fmt: skip

    def _teach_pictures(self) -> None:
        start = ("--resume_from", self.folders.questions / "checkpoints")
        latents = ("--vae_path", self.folders.autoencoder, "--latent_cache", self.folders.latents)
        self._train(self.folders.results, "pictures", _PICTURES, "--config", PICTURES_CONFIG, *start, *latents,
                    "--checkpoint_dir", self.folders.checkpoints, *self.settings.flags)  # fmt: skip

    def _train(self, results: Path, label: str, weights: Mapping[str, Weight], *flags: str | Path) -> None:
        dataset = self.folders.data / f"{label}.yaml"
        write_yaml(lesson(read_yaml(self.folders.dataset, "quickstart"), weights), dataset, f"What the lesson of {label} draws from.")
        data = ("--dataset_config_file", dataset, "--index_dir", self.folders.index)
        parts = ("--llm_path", self.folders.data / "llm", "--vit_path", self.folders.data / "vit")
        runs = ("--results_dir", results, "--auto_resume", "True", "--global_seed", str(self.settings.seed))
        command = launched_command(self.settings.processes, "train", *data, *parts, *runs, *flags)
        with TrainingBar(results, label) as bar:
            self._run(label, command, watch=bar.update)

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

    def _latest(self, lesson: Path) -> Path:
        return lesson / "checkpoints" / _LATEST

    def _newest_step(self) -> str:
        return (self.folders.checkpoints / _LATEST).read_text(encoding="utf-8").strip()

    def _exported(self) -> Path | None:
        marker = self.folders.out / "model.step"
        is_current = marker.is_file() and marker.read_text(encoding="utf-8").strip() == self._newest_step()
        return self.folders.model / "ema.safetensors" if is_current else None
