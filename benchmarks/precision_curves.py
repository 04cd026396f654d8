# SPDX-License-Identifier: Apache-2.0
"""Losses of the small world in bf16 and in every form of FP8, beside the same training in another precision, as JSON.

    python -m benchmarks.precision_curves --out FOLDER --output benchmarks/results/precision-curves.json
    python -m benchmarks.precision_curves --tiny                                # a few steps, to see that it runs

The world and the settings are those of the quickstart's first lesson (docs/small_world.md): the same data, weights and order for each
precision. The record has each curve at a few points, and how far it is from that of bf16: the mean difference of the logged losses, and the
largest. A form that cannot run here has the reason under ``refused``. A second call does only what the first one has not, and is refused
with other steps, another seed or another world.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from megatron_bagel import platform  # noqa: E402

platform.install()

from benchmarks.record import report, write_record  # noqa: E402
from benchmarks.small_world_experts import WORLD, losses_of, make_data  # noqa: E402
from megatron_bagel.sample_world.assets import QUESTIONS_CONFIG  # noqa: E402
from megatron_bagel.sample_world.exam import read_lines  # noqa: E402
from megatron_bagel.sample_world.quickstart.commands import CommandFailedError, launched_command, run  # noqa: E402

_FP8 = {"bf16": True, "transformer_impl": "transformer_engine", "fp8": "hybrid"}
#: What is trained, by name. ``bf16`` is what the others are compared with.
PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "fp32": {"bf16": False},
    "fp8 delayed": {**_FP8, "fp8_recipe": "delayed"},
    "fp8 tensorwise": {**_FP8, "fp8_recipe": "tensorwise"},
    "fp8 tensorwise, ends in bf16": {**_FP8, "fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
    "fp8 blockwise": {**_FP8, "fp8_recipe": "blockwise"},
    "fp8 mxfp8": {**_FP8, "fp8_recipe": "mxfp8"},
}
TINY_WORLD = ("--image-size", "32", "--layers", "2", "--vlm", "24", "--t2i", "4", "--edit", "4")
_REASON_CHARACTERS = 500


def training(out: Path, name: str, arguments: argparse.Namespace) -> list[str]:
    """Return the command that trains in one precision and saves nothing but its metrics and last checkpoint."""
    data, folder, steps = out / "data", folder_of(out, name), str(arguments.steps)
    flags: dict[str, Any] = {
        "config": QUESTIONS_CONFIG, "dataset_config_file": data / "questions.yaml", "index_dir": out / "index",
        "llm_path": data / "llm", "vit_path": data / "vit", "global_seed": arguments.seed, "results_dir": folder / "results",
        "checkpoint_dir": folder / "checkpoints", "total_steps": steps, "save_every": steps, "log_every": 1, "overwrite_run": True,
        "warmup_steps": arguments.steps // 8,
        **PRECISIONS[name],
    }  # fmt: skip
    return launched_command(1, "train", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value))))


def check_folder(out: Path, arguments: argparse.Namespace) -> None:
    """Note what a folder's runs are trained with. Raises ValueError if it holds runs of something else."""
    settings, file = {name: getattr(arguments, name) for name in ("steps", "seed", "tiny")}, out / "settings.json"
    if file.exists() and (earlier := json.loads(file.read_text(encoding="utf-8"))) != settings:
        raise ValueError(f"{out} holds runs with {earlier}, not {settings}: choose another --out, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings), encoding="utf-8")


def folder_of(out: Path, name: str) -> Path:
    """Return the folder of one training."""
    return out / name.replace(", ", "-").replace(" ", "-")


def curve(out: Path, name: str, arguments: argparse.Namespace) -> list[Mapping[str, Any]] | str:
    """Train if it has not been done, and return the metrics of every step, or why there are none."""
    folder = folder_of(out, name)
    if not (folder / "complete").exists():
        try:
            run([training(out, name, arguments)], folder / "log.txt")
        except CommandFailedError:
            lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if " error: " in line] or [line for line in lines if "Error: " in line] or lines
            return said[-1][-_REASON_CHARACTERS:]
        (folder / "complete").touch()
    return read_lines(folder / "results/metrics.jsonl")


def compared(history: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return how far the losses of two trainings are apart, step by step."""
    differences = np.array([record["ce"] - other["ce"] for record, other in zip(history, reference, strict=True)])
    return {"mean_difference": float(differences.mean()), "largest_difference": float(np.abs(differences).max())}


def measure(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Train in each precision into ``result``, and write the record after each."""
    out, reference = arguments.out.absolute(), None
    check_folder(out, arguments)
    make_data(out, arguments.seed, TINY_WORLD if arguments.tiny else WORLD)
    for name in arguments.precisions:
        history = curve(out, name, arguments)
        if isinstance(history, str):
            result["precisions"][name] = {"refused": history}
        else:
            reference = history if name == "bf16" else reference
            result["precisions"][name] = {"ce": losses_of(history)} | (compared(history, reference) if reference is not None else {})
        if arguments.output:
            write_record(arguments.output, result)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train in every precision, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the runs, which a second call continues (default: one that is removed)")
    parser.add_argument("--steps", type=int, help="of each training (default: 200)")
    parser.add_argument("--tiny", action="store_true", help="a few steps in a world of few pictures")
    parser.add_argument("--seed", type=int, default=0, help="of data and weights (default: %(default)s)")
    parser.add_argument("--precisions", default=";".join(PRECISIONS), help=f"of {'; '.join(PRECISIONS)}, split by ; (default: all)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    arguments.precisions = [name.strip() for name in arguments.precisions.split(";")]
    if unknown := [name for name in arguments.precisions if name not in PRECISIONS]:
        parser.error(f"unknown precision {', '.join(unknown)}; there are {'; '.join(PRECISIONS)}")
    arguments.steps = arguments.steps or (3 if arguments.tiny else 200)
    result: dict[str, Any] = {"steps": arguments.steps, "seed": arguments.seed, "precisions": {}}
    with tempfile.TemporaryDirectory() as folder:
        arguments.out = arguments.out or Path(folder)
        measure(arguments, result)
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
