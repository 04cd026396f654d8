# SPDX-License-Identifier: Apache-2.0
"""Peak memory of training against the packs of a step, with ``--encoder_memory step`` and ``constant``.

    python -m benchmarks.encoder_memory                     # 1, 8 and 32 packs per step
    python -m benchmarks.encoder_memory --packs 1 4 --chunk 256

Each run is ``megatron_bagel train`` in a fresh process, on the quickstart's data and model, without stored latents. Peak memory is the
training process's; the data worker is a process of its own. The losses of both ways are compared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from benchmarks.record import report  # noqa: E402
from megatron_bagel.cli.data import sample as make_sample_data  # noqa: E402
from megatron_bagel.data.index.build import BuildOptions, build_index  # noqa: E402
from megatron_bagel.data.sources.dataset_config import load_groups  # noqa: E402
from megatron_bagel.sample_world.assets import TRAIN_CONFIG  # noqa: E402
from megatron_bagel.training.observability.metrics_file import read_history  # noqa: E402

MODES = ("step", "constant")


def make_world(folder: Path, model: Sequence[str]) -> list[str]:
    """Make sample data in ``folder``, with sizes of the model in the flags ``model``; return the flags that all runs share."""
    make_sample_data.main([str(folder / "data"), "--t2i", "400", "--edit", "200", "--vlm", "400", "--captions-per-image", "1", *model])
    data = folder / "data"
    build_index(load_groups(data / "dataset.yaml"), data / "tokenizer", folder / "index", BuildOptions(workers=1, progress=False))
    settings = {
        "config": TRAIN_CONFIG, "llm_path": data / "llm", "vit_path": data / "vit", "vae_path": data / "vae" / "ae.safetensors",
        "dataset_config_file": data / "dataset.yaml", "index_dir": folder / "index", "log_every": 1, "save_every": 1_000_000,
        "warmup_steps": 0,
    }  # fmt: skip
    return [f"--{name}={value}" for name, value in settings.items()]


def measure(shared: Sequence[str], results: Path, packs: int, mode: str, chunk: int, steps: int) -> dict[str, Any]:
    """Train, and read the run's own metrics. Raises RuntimeError with the end of its output when the run fails."""
    flags = [f"--global_batch_size={packs}", f"--encoder_memory={mode}", f"--encoder_chunk_tokens={chunk}", f"--total_steps={steps}"]
    folders = [f"--results_dir={results}", f"--checkpoint_dir={results / 'checkpoints'}"]
    command = [sys.executable, "-m", "megatron_bagel", "train", *shared, *flags, *folders]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{packs} packs with {mode} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    history = read_history(results / "metrics.jsonl")
    return {
        "peak_megabytes": max(record["peak_mem_bytes"] for record in history) / 1e6,
        "losses": [record["loss"] for record in history],
        "gradient_norms": [record["grad_norm"] for record in history],
        "step_s": min(record["step_time_s"] for record in history),
    }


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the largest relative difference of two lists of numbers."""
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 8, 32], metavar="N", help="packs per step (default 1 8 32)")
    parser.add_argument("--chunk", type=int, default=512, help="--encoder_chunk_tokens of the constant runs (default 512)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each run (default 2)")
    parser.add_argument("--vit", nargs="*", default=[], metavar="FLAG=N",
                        help="other sizes of the vision tower, as flags of `data sample` without their dashes: vit-layers=12")  # fmt: skip
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    arguments = parse_arguments(argv)
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shared = make_world(Path(folder), [f"--{flag}" for flag in arguments.vit])
        for packs in arguments.packs:
            by_mode = {
                mode: measure(shared, Path(folder) / f"{packs}-{mode}", packs, mode, arguments.chunk, arguments.steps) for mode in MODES
            }
            step, constant = (by_mode[mode] for mode in MODES)
            compared = {f"{name}_difference": difference(constant[name], step[name]) for name in ("losses", "gradient_norms")}
            runs[str(packs)] = {**by_mode, **compared}
    result = {"chunk_tokens": arguments.chunk, "vit": arguments.vit, "packs_per_step": runs}
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
