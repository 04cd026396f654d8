# SPDX-License-Identifier: Apache-2.0
"""A folder in which the documentation's commands can run as a reader would run them: the repository's programs, and small things under the
names that the pages use, so that a command is run as it is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from tests.docs.commands import ROOT, Command, commands
from tests.docs.expected_output import blocks, missing

LINKED = ("megatron_bagel", "tools", "data_tools", "examples", "benchmarks", "tests", "setup.py", "pyproject.toml", "README.md")


@dataclass(frozen=True)
class Fitting:
    """How a command is made small enough for a test, or given what a reader would have: words after it, a command before it, variables."""

    more: str = ""
    first: str = "true"
    variables: dict[str, str] = field(default_factory=dict)


_STEPS = "--total_steps 2 --warmup_steps 1 --save_every 2 --log_every 1 --num_workers 1"
_QUICK = "--num-timesteps 2 --max-length 4"
_NEW_INDEX, _NEW_CHECKPOINTS = "rm -rf index", "rm -rf results/checkpoints"
#: Part of a command -> its fitting; the first that is found in it counts.
FITTINGS: dict[str, Fitting] = {
    "examples/quickstart.sh": Fitting(
        "quickstart --question_steps 2 --total_steps 2 --warmup_steps 1 --split 90,10 --eval_every 2 --eval_samples 2",
        "python data_tools/make_sample_data.py quickstart/data --t2i 20 --edit 20 --vlm 20 --edit-kinds recolour",
    ),
    "small_world/run.sh": Fitting(
        "--total_steps 2 --warmup_steps 1 --save_every 2",
        variables={
            "T2I": "60",
            "EDIT": "30",
            "VLM": "60",
            "QUESTION_STEPS": "2",
            "EXAM": "--pictures 2 --questions 2 --edits 2",
            "PUZZLES": "60",
            "PUZZLE_STEPS": "2",
            "PUZZLE_EXAM": "--pictures 0 --questions 0 --edits 0 --puzzles 2",
        },
    ),
    "small_world/interleaved.sh": Fitting(
        "--total_steps 2 --warmup_steps 1 --save_every 2",
        variables={"INTERLEAVED": "60", "EXAM": "--pictures 0 --questions 0 --edits 0 --puzzles 2"},
    ),
    "small_world/layouts.sh": Fitting("--total_steps 2 --warmup_steps 1 --save_every 2"),
    "--profile_step_start 2": Fitting(),
    "--lora_experts gen --lr 1e-4": Fitting(_STEPS, "rm -rf results"),
    "-m megatron_bagel.train": Fitting(_STEPS),
    "data sample first/data": Fitting("--t2i 40 --edit 20 --vlm 40"),
    "evaluate geneval": Fitting("--image-size 64x64 --num-timesteps 2 --limit 1 --num-samples 1"),
    "evaluate mme": Fitting("--max-length 4 --vit-transform 140 140"),
    "--model my_model --prompt": Fitting(f"{_QUICK} --image-size 64x64"),
    "-m megatron_bagel.generate": Fitting(_QUICK),
    "benchmarks.generate": Fitting("--tokens 4 --side 64 --steps 2"),
    "benchmarks.checkpoint convert": Fitting("--gigabytes 0.01"),
    "benchmarks.checkpoint saves": Fitting("--config bench-tiny"),
    "benchmarks.parallel_step": Fitting("--steps 1 --warmup 0"),
    "benchmarks.observing": Fitting("--config bench-tiny --rounds 5 --steps 1"),
    "--job-index 3": Fitting(
        "--workers 1 --num-jobs 2 --job-index 1",
        f"{_NEW_INDEX} && python data_tools/build_index.py --dataset_config_file data.yaml --data-root bagel_example "
        "--tokenizer hf/BAGEL-7B-MoT --output index --num-jobs 2 --job-index 0",
    ),
    "build_index.py": Fitting("--workers 1", _NEW_INDEX),
    "hf_to_megatron.py --model hf": Fitting(first=_NEW_CHECKPOINTS),
    "init_from_pretrained.py": Fitting("--vit-max-num-patch-per-side 10", _NEW_CHECKPOINTS),
    "--untrained-from": Fitting(first="rm -rf my_model"),
    "inspect_checkpoint.py compare": Fitting(first="rm -rf other && mkdir other && cp -r results/checkpoints other/"),
    "verify_index.py": Fitting("--workers 1"),
}
#: Commands that no test starts as they are written: part of the command -> what tests them.
ELSEWHERE = {
    "tests/run.sh": "it is what runs the tests",
    "-m pip install": "makes the environment in which the tests run",
    "setup_env.sh": "makes the environment in which the tests run",
    "build_index.sbatch": "tests/examples/test_build_index_sbatch.py, with a stand-in for Slurm",
    "--engine ray": "tests/data/index/test_ray_engine.py, on Ray clusters of this machine",
    "verify_golden.py": "tests/tools/test_verify_golden.py, where the recorded numbers are",
    "record_runs.py": "tests/tools/test_record_runs.py, which records two cases and continues them",
    "compare_runs.py": "tests/tools/test_compare_runs.py, on each kind of input",
    "--serve": "tests/inference/web/test_server.py, which starts the command and asks the page",
    "ByteDance-Seed/": "tests/cli/test_hub_models.py, with a server on loopback in place of the hub",
    "convert push": "tests/checkpoint/hf/test_hub.py, with a server on loopback in place of the hub",
    "benchmarks.released_size": "tests/benchmarks/test_released_size.py, where the disk has room",
    "MEGATRON_BAGEL_VLLM_OMNI=": "tests/servers/test_vllm_omni.py, where an environment with vllm-omni is",
    "MEGATRON_BAGEL_REFERENCE=": "tests/servers/test_original.py, where a checkout of the original and its environment are",
    "tests/faults": "the suite runs the short ones; the slow ones take longer than a test of a page may",
    "small_world/ablation.sh": "it calls small_world/run.sh, which runs here, six times",
}


def elsewhere(command: Command) -> bool:
    """Whether a command is tested by other means."""
    return any(part in command.text for part in ELSEWHERE)


def fitting_of(command: Command) -> Fitting:
    """The first fitting whose key is in the command."""
    return next((fitting for part, fitting in FITTINGS.items() if part in command.text), Fitting())


def make_shared(folder: Path) -> Path:
    """What all pages' folders link to: a small trained model in the places where the quickstart leaves its own, and parts to start from."""
    import torch
    from transformers import AutoConfig, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    from megatron_bagel.cli.convert import megatron_to_hf
    from tests.runs import make_world, run, run_config

    world = make_world(folder / "quickstart_output")
    results = world / "results"
    run(run_config(world, results, total_steps=2, checkpoint_dir=str(world / "checkpoints"), tokenizer_path=str(world / "data/tokenizer")))
    words = ["--checkpoint", str(world / "checkpoints"), "--output", str(world / "model"), "--dtype", "fp32"]
    assert not megatron_to_hf.main(words)
    torch.manual_seed(0)
    Qwen2ForCausalLM(AutoConfig.from_pretrained(world / "data/llm")).save_pretrained(folder / "hf/Qwen2.5-0.5B-Instruct")
    shutil.copytree(world / "data/tokenizer", folder / "hf/Qwen2.5-0.5B-Instruct", dirs_exist_ok=True)
    SiglipVisionModel(SiglipVisionConfig.from_pretrained(world / "data/vit")).save_pretrained(folder / "hf/siglip")
    for file in world.glob("ae*"):
        (folder / "flux/vae").mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "flux/vae" / file.name)
    Image.new("RGB", (64, 64), "red").save(folder / "photo.png")
    Image.new("RGB", (64, 64), "blue").save(folder / "room.png")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a red circle", "size": [64, 64]}) + "\n")
    (folder / "evaluation_metadata.jsonl").write_text(json.dumps({"tag": "single_object", "include": [], "prompt": "a red circle"}) + "\n")
    (folder / "MME_FOLDER").mkdir()
    shutil.copy(folder / "photo.png", folder / "MME_FOLDER/photo.png")
    (folder / "MME_FOLDER/color.txt").write_text("photo.png\tIs it red?\tYes\n")
    return folder


def page_folder(shared: Path, folder: Path, wheel: Path | None = None) -> Path:
    """A folder of its own for the commands of one page, so that what one page writes is not in another one's way.

    With ``wheel``, an environment that has the package from its wheel, the folder has nothing of the repository, and the environment's own
    programs run.
    """
    folder.mkdir()
    for name in LINKED if wheel is None else ():
        (folder / name).symlink_to(ROOT / name)
    if wheel is None:  # a copy, because commands write tables into pages
        shutil.copytree(ROOT / "docs", folder / "docs")
    world = shared / "quickstart_output"
    shutil.copytree(world, folder / "quickstart_output")
    (folder / "data/configs").mkdir(parents=True)
    (folder / "data/configs/example.yaml").symlink_to(world / "data/dataset.yaml")
    for name in ("hf", "flux", "photo.png", "room.png", "prompts.jsonl", "evaluation_metadata.jsonl", "MME_FOLDER"):
        (folder / name).symlink_to(shared / name)
    (folder / "hf").unlink()
    shutil.copytree(shared / "hf", folder / "hf")
    (folder / "hf/BAGEL-7B-MoT").symlink_to(world / "model")
    (folder / "models").mkdir()
    for name in ("BAGEL-7B-MoT", "dense"):
        (folder / "models" / name).symlink_to(world / "model")
    (folder / "run.yaml").write_text(
        "{model_path: models/BAGEL-7B-MoT, finetune_from_hf: true, dataset_config_file: data.yaml, index_dir: index, "
        "max_num_tokens: 320, expected_num_tokens: 256, max_num_tokens_per_sample: 256, ema: 0.9}\n"
    )
    for name, target in {"DIR": "model", "bagel_example": "data", "data.yaml": "data/dataset.yaml", "index": "index"}.items():
        (folder / name).symlink_to(world / target)
    shutil.copytree(world / "results", folder / "results")
    shutil.copytree(world / "checkpoints", folder / "results/checkpoints")
    shutil.copytree(world / "checkpoints", folder / "other/checkpoints")
    (folder / "bin").mkdir()
    if wheel is not None:
        # Scripts, because a link to an interpreter would not find its environment. ``tests/wheel.sh`` lends the environment PyTorch without
        # PyTorch's own programs.
        programs = {"python": ("python", ""), "torchrun": ("python", "-m torch.distributed.run "), "megatron-bagel": ("megatron-bagel", "")}
        for name, (program, words) in programs.items():
            (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{wheel}/bin/{program}" {words}"$@"\n')
            (folder / "bin" / name).chmod(0o755)
        return folder
    for name, words in {"python": "", "torchrun": "-m torch.distributed.run ", "megatron-bagel": "-m megatron_bagel "}.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def run_in(folder: Path, command: Command, wheel: bool = False) -> str:
    """Run a command with its fitting and return what it printed. Raises AssertionError with it when the command fails. With ``wheel`` the
    repository is not on the path of modules."""
    fit = fitting_of(command)
    text = f"{fit.first} && {command.text.split(' #')[0].rstrip()} {fit.more}"
    environment = {
        **os.environ, "PATH": f"{folder}/bin:{os.environ['PATH']}", "PYTHON": sys.executable, "PYTHONPATH": "" if wheel else str(ROOT),
        "OMP_NUM_THREADS": "1", "model_path": "hf/BAGEL-7B-MoT", "ckpt_path": "results/checkpoints", **fit.variables,
    }  # fmt: skip
    done = subprocess.run(["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, f"{command.name}: {text}\nstatus {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return f"{done.stdout}\n{done.stderr}"


def run_page(folder: Path, chosen: Sequence[Command], page: Path, wheel: bool = False) -> None:
    """Run commands of a page in their order. Where all commands of a block ran, its output must be what the page says below it."""
    printed = {command: run_in(folder, command, wheel) for command in chosen}
    for block in blocks(page):
        inside = [command for command in commands() if command.page == page and block.first < command.line < block.last]
        if block.expected and all(command in printed for command in inside):
            together = "\n".join(printed[command] for command in inside)
            absent = missing(block.expected, together)
            assert not absent, f"{block.name} says that its commands print {absent[0]!r}, but they print\n{together}"
