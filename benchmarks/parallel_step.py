# SPDX-License-Identifier: Apache-2.0
"""Time per step of whole training runs on several layouts, as JSON: what a second process of a CPU is worth.

    python -m benchmarks.parallel_step                        # one process, DP2, PP2
    python -m benchmarks.parallel_step one tp2 cp2 --steps 6  # others; see LAYOUTS

Every layout is a run of ``megatron_bagel.train`` on the same data and the same global batches, each process with one thread, on a
model whose time goes into matrix products. Run it on an otherwise idle machine with as many cores as the layout has processes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import report
from megatron_bagel.cli.data import sample as make_sample_data
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import save_autoencoder
from megatron_bagel.training.observability.metrics_file import read_history

#: Processes and flags. Pipelines need many packs per step, or their stages stand idle: see GLOBAL_BATCH.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "dp2": (2, []),
    "dp2-overlap": (2, ["--overlap_grad_reduce", "--overlap_param_gather"]),
    "pp2": (2, ["--pipeline_model_parallel_size=2"]),
    "pp2-vpp2": (2, ["--pipeline_model_parallel_size=2", "--virtual_pipeline_model_parallel_size=2"]),
    "tp2": (2, ["--tensor_model_parallel_size=2"]),
    "tp2-sp": (2, ["--tensor_model_parallel_size=2", "--sequence_parallel"]),
    "cp2": (2, ["--context_parallel_size=2"]),
    "cp2-a2a": (2, ["--context_parallel_size=2", "--cp_comm_type=a2a"]),
}
GLOBAL_BATCH, TOKENS = 8, 1024
WORLD = ["--t2i", "120", "--edit", "60", "--vlm", "60", "--text", "60", "--image-size", "32"]
MODEL = ["--hidden-size", "256", "--layers", "4", "--vit-hidden-size", "32", "--vit-layers", "2"]
AUTOENCODER = AutoencoderArch(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4)


def make_world(folder: Path) -> list[str]:
    """Sample data and configs of the model in ``folder``; the flags that every layout shares."""
    make_sample_data.main([str(folder / "data"), *WORLD, *MODEL])
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AUTOENCODER), folder / "ae.safetensors")
    settings = {
        "llm_path": folder / "data/llm",
        "vit_path": folder / "data/vit",
        "vae_path": folder / "ae.safetensors",
        "dataset_config_file": folder / "data/dataset.yaml",
        "init_random": True,
        "vit_max_num_patch_per_side": 10,
        "max_latent_size": 8,
        "max_num_tokens": TOKENS,
        "expected_num_tokens": TOKENS - 64,
        "max_num_tokens_per_sample": TOKENS,
        "global_batch_size": GLOBAL_BATCH,
        "num_workers": 0,
        "warmup_steps": 1,
        "log_every": 1,
        "save_every": 1_000_000,
        "bf16": False,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def measure(layout: str, shared: Sequence[str], results: Path, steps: int, warmup: int) -> dict[str, Any]:
    """Run a layout and read its own metrics. Raises RuntimeError with the end of its output when the run fails."""
    processes, flags = LAYOUTS[layout]
    run = ["-m", "megatron_bagel.train", *shared, *flags, f"--total_steps={warmup + steps}", f"--results_dir={results}",
           f"--checkpoint_dir={results / 'checkpoints'}"]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run([sys.executable, *launcher, *run], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"layout {layout} ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    history = read_history(results / "metrics.jsonl")[warmup:]
    seconds = statistics.median(record["step_time_s"] for record in history)
    return {
        "processes": processes,
        "flags": flags,
        "step_s": seconds,
        "tokens_per_s": statistics.median(record["tokens_per_s"] for record in history),
        "peak_mem_bytes": max(record["peak_mem_bytes"] for record in history),
        "loss": history[-1]["loss"],
    }


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)} (default: one dp2 pp2)")
    parser.add_argument("--steps", type=int, default=4, help="measured steps; medians are reported (default 4)")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the measured ones (default 1)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    arguments.layouts = arguments.layouts or ["one", "dp2", "pp2"]
    if unknown := [name for name in arguments.layouts if name not in LAYOUTS]:
        parser.error(f"unknown layout {', '.join(unknown)}; there are {', '.join(LAYOUTS)}")
    if arguments.steps < 1 or arguments.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    return arguments


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it. ``speedup`` is tokens per second over those of layout ``one``."""
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as folder:
        shared = make_world(Path(folder))
        measured = {name: measure(name, shared, Path(folder) / name, arguments.steps, arguments.warmup) for name in arguments.layouts}
    if "one" in measured:
        for numbers in measured.values():
            numbers["speedup"] = numbers["tokens_per_s"] / measured["one"]["tokens_per_s"]
    result = {"torch": torch.__version__, "cores": os.cpu_count(), "packs_per_step": GLOBAL_BATCH, "layouts": measured}
    report(result, arguments.output)
    return result


if __name__ == "__main__":
    main()
