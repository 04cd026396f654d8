# SPDX-License-Identifier: Apache-2.0
"""Teaches a small model a colour that it never saw, by adapters alone, and marks it before and after.

    megatron-bagel quickstart OUT
    python -m benchmarks.new_colour OUT --work FOLDER --output FILE

The base is the quickstart's model. Half of the lesson's pictures show the new colour, half the known ones. The same exam, in halves too,
is taken by the base and by the base with its adapter: questions about pictures, and pictures from words. Everything is a command of the
package: `data build`, `generate`, `train`, `generate --adapter`. A second run goes on where the first one stopped; its minutes are its own.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.record import report
from megatron_bagel.checkpoint.dist.stored_adapter import adapter_of
from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.common.json_files import read_json
from megatron_bagel.sample_world.exam import Exam, marks, read_lines, write_exam
from megatron_bagel.sample_world.folders import FolderSpec, write_folders, write_yaml
from megatron_bagel.sample_world.quickstart.commands import module_command, run
from megatron_bagel.sample_world.quickstart.stages import DRAWING
from megatron_bagel.sample_world.world import COLOURS, NEW_COLOURS, World, read_world

#: Packs as small as the quickstart's: more, smaller steps teach a small model faster than few large ones.
TRAINING = (
    "--finetune_from_hf", "True", "--resume_model_only", "True", "--layer_module", "Qwen2MoTDecoderLayer", "--auto_resume", "True",
    "--expected_num_tokens", "640", "--max_num_tokens", "704", "--max_num_tokens_per_sample", "352", "--num_workers", "0",
    "--eps", "1e-8", "--beta2", "0.99",
    "--warmup_steps", "10", "--lr_scheduler", "cosine", "--min_lr", "1e-4", "--timestep_shift", "3", "--ce_weight", "0.5",
    "--text_cond_dropout_prob", "0.1", "--vae_cond_dropout_prob", "0.1", "--vit_cond_dropout_prob", "0.1", "--log_every", "20",
)  # fmt: skip
HALVES = ("new", "known")


@dataclass(frozen=True)
class Lesson:
    """Folders of a lesson and what it teaches."""

    quickstart: Path
    work: Path
    colour: str
    model: Path

    @property
    def world(self) -> World:
        """The world of the base."""
        return read_world(self.quickstart / "data/world.json")

    def half(self, name: str) -> World:
        """The world of the new colour alone, or of the known ones."""
        return self.world if name == "known" else replace(self.world, colours=(self.colour,), held_out=frozenset())

    def command(self, log: str, *words: str | Path) -> None:
        """Run a command of the package. Raises CommandFailedError if it fails."""
        run([module_command(*words)], self.work / f"logs/{log}.txt")


def write_lesson(lesson: Lesson, pictures: int, questions: int) -> None:
    """Write pictures with captions, and pictures with questions, and their index with the base's tokenizer, unless they exist."""
    if (lesson.work / "index/manifest.json").exists():
        return
    described = read_json(lesson.quickstart / "data/world.json", "the description that `data sample` writes beside its data")
    kept = {item.name: described[item.name] for item in fields(FolderSpec) if item.name in ("seed", "captions_per_image", "vit_side")}
    known = lesson.world.colours
    # A colour that is named as often as all others together is in half of the scenes.
    world = replace(lesson.world, colours=(*known, *[lesson.colour] * len(known)))
    kept["seed"] += 1
    kinds = ("colour", "shape", "position")
    spec = FolderSpec(world, t2i=pictures, edit=0, vlm=questions, question_kinds=kinds, questions_per_image=3, **kept)
    folder = lesson.work / "data"
    folder.mkdir(parents=True)
    write_yaml(write_folders(spec, folder, folder), folder / "dataset.yaml", f"A lesson about {lesson.colour}.")
    paths = ("--tokenizer", lesson.quickstart / "data/tokenizer", "--output", lesson.work / "index")
    lesson.command("index", "data", "build", "--dataset_config_file", folder / "dataset.yaml", *paths)


def write_halves(lesson: Lesson, exam: Exam) -> None:
    """Write the prompts of both halves in one file, and the truth of each in a folder of its own."""
    prompts = []
    for half in HALVES:
        folder = lesson.work / f"exam/{half}"
        write_exam(lesson.half(half), exam, folder)
        asked, truths = read_lines(folder / "prompts.jsonl"), read_lines(folder / "truth.jsonl")
        images = [{"image": f"{half}/{row['image']}"} if "image" in row else {} for row in asked]
        prompts += [{**row, "id": f"{half}_{row['id']}", **image} for row, image in zip(asked, images, strict=True)]
        (folder / "truth.jsonl").write_text(_jsonl({**row, "id": f"{half}_{row['id']}"} for row in truths))
    (lesson.work / "exam/prompts.jsonl").write_text(_jsonl(prompts))


def _jsonl(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def examine(lesson: Lesson, name: str, drawing: Sequence[str], adapter: Sequence[str | Path] = ()) -> dict[str, dict[str, float]]:
    """Return the marks of the base, or of the base with an adapter, by half of the exam."""
    table, answers = {}, lesson.work / f"answers/{name}"
    paths = ("--model", lesson.model, *adapter, "--input", lesson.work / "exam/prompts.jsonl", "--out", answers)
    lesson.command(f"exam-{name}", "generate", *paths, *drawing, "--batch-size", "24", "--resume")
    for half in HALVES:
        rights = marks(lesson.work / f"exam/{half}", answers, (*COLOURS, lesson.colour))
        # Pairs that the base never saw together count in one number with the others.
        names = dict.fromkeys(kind for kind, _ in rights)
        table[half] = {kind: fmean(right for (k, _), list_ in rights.items() if k == kind for right in list_) for kind in names}
    return table


def train(lesson: Lesson, rank: int, steps: int, lr: float, with_pictures: bool) -> None:
    """Train adapters on the lesson: of both experts, or without pictures of the understanding expert alone."""
    shape = HFFolder(lesson.model).arch
    sizes = {"max_latent_size": shape.max_latent_size, "vit_max_num_patch_per_side": shape.vit_max_num_patch_per_side}
    flags: dict[str, Any] = {
        "model_path": lesson.model, "resume_from": lesson.model, **sizes, "interpolate_pos": shape.interpolate_pos,
        "dataset_config_file": lesson.work / "data/dataset.yaml", "index_dir": lesson.work / "index",
        "results_dir": lesson.work / "results", "checkpoint_dir": lesson.work / "checkpoints", "save_every": steps,
        "lora_rank": rank, "lora_experts": "both" if with_pictures else "und", "total_steps": steps, "lr": lr,
        "ema": round(0.01 ** (3 / steps), 4),
    }  # fmt: skip
    targets = ("qkv", "proj", "fc1", "fc2", "connector", *(("vae2llm", "llm2vae") if with_pictures else ()))
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    lesson.command("training", "train", *TRAINING, "--lora_targets", *targets, *words)


def trained_share(lesson: Lesson) -> tuple[int, int]:
    """Return the elements of the adapters, and those of the base."""
    stored = adapter_of(sorted((lesson.work / "checkpoints").glob("[0-9]*"))[-1])
    if stored is None:
        raise ValueError(f"{lesson.work}/checkpoints holds no adapters; remove {lesson.work} and begin again")
    arch = HFFolder(lesson.model).arch
    adapters, base = (
        sum(prod(entry.shape) for entry in weight_map.entries.values()) for weight_map in (AdapterMap(arch, stored.lora), WeightMap(arch))
    )
    return adapters, base


def table_of(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> str:
    """Return the marks side by side, one line for each."""
    names = dict.fromkeys(name for half in before.values() for name in half)
    lines = [f"{'':20s}{'new, before':>13s}{'after':>8s}{'known, before':>16s}{'after':>8s}"]
    for name in names:
        shares = [f"{table[half][name]:.0%}" for half in HALVES for table in (before, after)]
        lines.append(f"{name:20s}{shares[0]:>13s}{shares[1]:>8s}{shares[2]:>16s}{shares[3]:>8s}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="new_colour", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("quickstart", type=Path, help="output folder of the quickstart: data/ and model/ are read")
    made.add_argument("--work", type=Path, required=True, help="folder to make: data, index, checkpoints, answers, logs")
    made.add_argument("--colour", choices=tuple(NEW_COLOURS), default="brown", help="what is taught (default: %(default)s)")
    made.add_argument("--pictures", type=int, default=600, help="pictures with captions; 0 teaches answers alone (default: %(default)s)")
    made.add_argument("--questions", type=int, default=600, help="pictures with questions (default: %(default)s)")
    made.add_argument("--rank", type=int, default=16, help="rank of the adapters (default: %(default)s)")
    made.add_argument("--steps", type=int, default=200, help="steps of training (default: %(default)s)")
    made.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default: %(default)s)")
    made.add_argument("--exam", type=int, nargs=2, default=(24, 12), metavar=("PICTURES", "QUESTIONS"),
                      help="pictures of each half, and questions of each kind (default: 24 12)")  # fmt: skip
    made.add_argument("--drawing", help="flags of generate, in one word (default: the quickstart's)")
    made.add_argument("--output", type=Path, help="write the record of the run (benchmarks/record.py) here")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Teach the colour, mark it, and report the figures."""
    args = parser().parse_args(argv)
    lesson = Lesson(args.quickstart.resolve(), args.work.resolve(), args.colour, args.quickstart.resolve() / "model")
    drawing = DRAWING if args.drawing is None else shlex.split(args.drawing)
    began = time.monotonic()
    write_lesson(lesson, args.pictures, args.questions)
    write_halves(lesson, Exam(args.exam[0] if args.pictures else 0, args.exam[1], 0))
    before = examine(lesson, "before", drawing)
    started = time.monotonic()
    train(lesson, args.rank, args.steps, args.lr, with_pictures=bool(args.pictures))
    trained = time.monotonic()
    after = examine(lesson, "after", drawing, ("--adapter", lesson.work / f"checkpoints/{args.steps:07d}"))
    adapters, base = trained_share(lesson)
    print(table_of(before, after))
    figures = {
        "colour": args.colour, "before": before, "after": after, "adapter_parameters": adapters, "base_parameters": base,
        "trained_share": round(adapters / base, 4), "training_minutes": round((trained - started) / 60, 1),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }  # fmt: skip
    report(figures, args.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
