# SPDX-License-Identifier: Apache-2.0
"""What sparse experts are worth at equal active parameters: the questions of the small world, learnt with one dense MLP for each kind of
token and with four experts of the same width of which one serves a token, on the same data for the same number of steps.

    python -m benchmarks.small_world_experts OUT --output benchmarks/results/small-world-experts.json

The world and the settings are those of the quickstart's first lesson (docs/small_world.md), its packs one a step and not two. The record
has the marks of both, losses on the way, and the share of tokens that each expert got in the last logged steps, by layer. Both train side
by side, one process each. A second call does only what the first one has not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel import platform  # noqa: E402

platform.install()

from benchmarks.record import report  # noqa: E402
from megatron_bagel.common.yaml_files import read_yaml  # noqa: E402
from megatron_bagel.config.parser import Config  # noqa: E402
from megatron_bagel.config.resolve import architecture  # noqa: E402
from megatron_bagel.costs.flops import token_matrix_elements  # noqa: E402
from megatron_bagel.sample_world.assets import QUESTIONS_CONFIG  # noqa: E402
from megatron_bagel.sample_world.exam import Exam, marks, read_lines, write_exam  # noqa: E402
from megatron_bagel.sample_world.folders import write_yaml  # noqa: E402
from megatron_bagel.sample_world.quickstart.commands import launched_command, module_command, run  # noqa: E402
from megatron_bagel.sample_world.quickstart.stages import lesson  # noqa: E402
from megatron_bagel.sample_world.world import read_world  # noqa: E402

#: The quickstart's world. Pictures to draw take no part, so a few are enough.
WORLD = (
    "--image-size", "48", "--vit-image-size", "42", "--layers", "4", "--initializer-range", "0.031", "--t2i", "8", "--edit", "8",
    "--vlm", "2000", "--captions-per-image", "1", "--edit-kinds", "recolour", "--questions-per-image", "3",
    "--question-kinds", "colour", "shape", "position", "--hold-out", "red:square", "green:circle", "purple:triangle", "cyan:cross",
)  # fmt: skip
EXAM = Exam(pictures=0, questions=48, edits=0)
#: An expert has the dense MLP's width, so a token meets as many parameters, and the router's few.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"num_experts": 4, "moe_router_topk": 1, "moe_router_pre_softmax": True, "moe_aux_loss_coeff": 0.01},
}
#: Logged steps whose loads and losses are averaged.
LAST = 3
#: Points of a training at which its loss is recorded.
POINTS = 6


def make_data(out: Path, seed: int, world: Sequence[str] = WORLD) -> None:
    """Make the data, its index, and the exam, if they are not there; ``world`` are flags of `megatron-bagel data sample`."""
    data = out / "data"
    if not (data / "questions.yaml").exists():
        run([module_command("data", "sample", data, *world, "--seed", str(seed))], out / "logs/data.txt")
        write_exam(read_world(data / "world.json"), EXAM, out / "exam")
        questions = lesson(read_yaml(data / "dataset.yaml", "the sample data"), {"vlm_sft": 1.0})
        write_yaml(questions, data / "questions.yaml", "What the lesson of questions draws from.")
    if not (out / "index/manifest.json").exists():
        paths = ("--dataset_config_file", data / "dataset.yaml", "--tokenizer", data / "tokenizer", "--output", out / "index")
        run([module_command("data", "build", *paths)], out / "logs/index.txt")


def train(out: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """Train, side by side, the models whose last checkpoints are not there, and return all these checkpoints."""
    checkpoints = {name: out / name / f"checkpoints/{arguments.steps:07d}" for name in MODELS}
    commands = [training(out, name, arguments) for name, checkpoint in checkpoints.items() if not checkpoint.exists()]
    if commands:
        run(commands, out / "logs/train.txt")
    return checkpoints


def training(out: Path, name: str, arguments: argparse.Namespace) -> list[str]:
    """Return the command that trains one model."""
    data, folder, steps = out / "data", out / name, str(arguments.steps)
    flags = ("--config", QUESTIONS_CONFIG, "--dataset_config_file", data / "questions.yaml", "--index_dir", out / "index")
    flags += ("--llm_path", data / "llm", "--vit_path", data / "vit", "--global_seed", str(arguments.seed), "--auto_resume", "True")
    flags += (
        "--results_dir",
        folder / "results",
        "--checkpoint_dir",
        folder / "checkpoints",
        "--total_steps",
        steps,
        "--save_every",
        steps,
    )
    words = [word for flag, value in MODELS[name].items() for word in (f"--{flag}", str(value))]
    return launched_command(1, "train", *flags, "--global_batch_size", "1", *words)


def examine(out: Path, name: str, checkpoint: Path) -> dict[str, Any]:
    """Let a model answer the exam if it has not, and return what it reached."""
    folder = out / name
    if not (folder / "answers/complete").exists():
        asked = ("--model", checkpoint, "--input", out / "exam/prompts.jsonl", "--out", folder / "answers")
        run([module_command("generate", *asked, "--max-length", "12", "--vit-transform", "42", "42")], out / f"logs/{name}.txt")
        (folder / "answers/complete").touch()
    history = read_lines(folder / "results/metrics.jsonl")
    return {
        "steps": int(checkpoint.name), "ce": losses_of(history),
        "active_matrix_elements": active_elements(out / "data", name), "marks": marks_of(out / "exam", folder / "answers"),
    }  # fmt: skip


def losses_of(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The loss at ``POINTS`` equal distances: the mean of the logged steps up to each, ``LAST`` at most, by the last one's number."""
    ends = [len(history) * (point + 1) // POINTS for point in range(POINTS)]
    parts = [history[max(0, end - LAST) : end] for end in ends if end]
    return {f"step {part[-1]['step']}": round(float(np.mean([record["ce"] for record in part])), 4) for part in parts}


def active_elements(data: Path, name: str) -> int:
    """The elements of the decoder's matrices that serve a text token."""
    words = {"llm_path": str(data / "llm"), "visual_gen": False, "visual_und": False, "layer_module": "Qwen2MoTDecoderLayer"}
    return token_matrix_elements(architecture(Config.from_values({**words, **MODELS[name]})).llm, "und")


def marks_of(exam: Path, answers: Path) -> dict[str, dict[str, float]]:
    """The share of right answers by kind of question, on pairs of colour and shape that training showed and on those it did not."""
    table: dict[str, dict[str, float]] = {}
    for (name, pairs), rights in marks(exam, answers).items():
        table.setdefault(name, {})[pairs] = float(np.mean(rights))
    return table


def load_shares(results: Path) -> dict[str, list[float]]:
    """The share of text and ViT tokens that each expert got in the last logged steps, by layer."""
    records = [record["understanding"] for record in read_lines(results / "expert_load.jsonl")[-LAST:]]
    load = np.sum([record["load"] for record in records], axis=0, dtype=np.float64)
    shares = load / load.sum(1, keepdims=True)
    return {f"layer {layer}": row.round(4).tolist() for layer, row in zip(records[-1]["layers"], shares, strict=True)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train and examine both, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of both runs")
    parser.add_argument("--steps", type=int, default=480, help="of each training (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="copy the drawing of the loads here")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    out = arguments.out.absolute()
    make_data(out, arguments.seed)
    checkpoints = train(out, arguments)
    runs = {name: examine(out, name, checkpoint) for name, checkpoint in checkpoints.items()}
    if arguments.picture is not None:
        shutil.copyfile(out / "experts/results/expert_load.png", arguments.picture)
    result = {"seed": arguments.seed, "flags_of_experts": MODELS["experts"], **runs}
    result["expert_shares"] = load_shares(out / "experts/results")
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
