# SPDX-License-Identifier: Apache-2.0
"""The real commands in processes of their own, on the GPU or with it hidden."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_bagel.training.observability.metrics_file import read_history

ROOT = Path(__file__).resolve().parent.parent.parent

#: A tiny run: fp32, four steps, a usual epsilon (1e-15 makes a full update of the last bit of a gradient that should be zero).
TINY: dict[str, Any] = {
    "init_random": True, "vit_max_num_patch_per_side": 10, "max_latent_size": 4, "max_num_tokens": 320, "expected_num_tokens": 256,
    "max_num_tokens_per_sample": 256, "num_workers": 1, "lr": 1e-3, "eps": 1e-6, "warmup_steps": 2, "total_steps": 4, "log_every": 1,
    "save_every": 2, "global_batch_size": 2, "ema": 0.9, "auto_resume": True, "bf16": False,
}  # fmt: skip


def run(module: str, *arguments: str, gpu: bool = True, timeout: float = 240) -> str:
    """Output of ``python -m module``; fails with its end when it fails. Without ``gpu`` the process sees none."""
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=ROOT, env={**os.environ, **hidden}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, f"{module} {' '.join(arguments)}: {done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


def settings_file(world: Path, results: Path, **flags: Any) -> Path:
    """The settings of a tiny run on the sample world of ``tests.runs.make_world``, in a new file. ``flags`` win."""
    values = {
        **TINY, "llm_path": world / "data/llm", "vit_path": world / "data/vit", "vae_path": world / "ae.safetensors",
        "dataset_config_file": world / "data/dataset.yaml", "index_dir": world / "index",
        "results_dir": results, "checkpoint_dir": results / "checkpoints", **flags,
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    file = results / "flags.yaml"
    file.write_text(yaml.safe_dump({name: str(value) if isinstance(value, Path) else value for name, value in values.items()}))
    return file


def train(world: Path, results: Path, gpu: bool = True, launcher: bool = False, **flags: Any) -> list[Mapping[str, Any]]:
    """Such a run; the records of its ``metrics.jsonl``."""
    file = settings_file(world, results, **flags)
    command = ["megatron_bagel.train", "--config", str(file)]
    if launcher:
        command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", *command]
    run(*command, gpu=gpu)
    return read_history(results / "metrics.jsonl")
