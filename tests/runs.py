# SPDX-License-Identifier: Apache-2.0
"""Small real runs for tests: a sample world on disk with its index and an autoencoder, and the loop on forked ranks."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_bagel.cli.data import sample as make_sample_data
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import architecture
from megatron_bagel.config.validate import validate
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.sources.dataset_config import load_groups
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import save_autoencoder
from megatron_bagel.training.observability.metrics_file import read_history
from tests.distributed import fork, run_ranks

if TYPE_CHECKING:
    from megatron_bagel.training.loop import Run
    from megatron_bagel.training.resolved_run import ResolvedRun

SIZES = ["--hidden-size", "64", "--layers", "2", "--vit-hidden-size", "32", "--vit-layers", "2", "--vit-patches-per-side", "10"]
AUTOENCODER = AutoencoderArch(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4)

#: Seconds after which a run counts as hung. It is long because gloo's collectives wait for each other's turns on a busy machine.
RUN_TIMEOUT = 900


def make_world(folder: Path) -> Path:
    """Sample data of every kind, its index, and an autoencoder with random weights."""
    counts = ["--t2i", "24", "--edit", "16", "--vlm", "16", "--text", "8"]
    make_sample_data.main([str(folder / "data"), *counts, *SIZES])
    build_index(load_groups(folder / "data/dataset.yaml"), folder / "data/tokenizer", folder / "index", BuildOptions(workers=1))
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(AUTOENCODER), folder / "ae.safetensors")
    return folder


def run_config(world: Path, results: Path, ranks: int = 1, **flags: Any) -> Config:
    """A tiny run on the world; ``flags`` win."""
    values: dict[str, Any] = {
        "llm_path": str(world / "data/llm"),
        "vit_path": str(world / "data/vit"),
        "vae_path": str(world / "ae.safetensors"),
        "init_random": True,
        "dataset_config_file": str(world / "data/dataset.yaml"),
        "index_dir": str(world / "index"),
        "vit_max_num_patch_per_side": 10,
        "max_latent_size": 4,
        "max_num_tokens": 320,
        "expected_num_tokens": 256,
        "max_num_tokens_per_sample": 256,
        "num_workers": 0,
        "lr": 1e-3,
        "warmup_steps": 2,
        "total_steps": 4,
        "log_every": 1,
        "save_every": 2,
        "global_batch_size": 2,
        "ema": 0.9,
        "results_dir": str(results),
        "checkpoint_dir": str(results / "checkpoints"),
        "auto_resume": True,
    }
    config = Config.from_values({**values, **flags})
    validate(config, ranks, has_gpu=False)
    return config


def resolved(config: Config, ranks: int = 1, has_gpu: bool = False) -> ResolvedRun:
    """The run as the command resolves it, on CPU ranks by default."""
    from megatron_bagel.cli.resolve_run import resolve_run

    return resolve_run(config, architecture(config), ranks, has_gpu)


def preload() -> None:
    """Import what a run imports. Ranks are forked from this process, and each would do it for itself."""
    for name in ("megatron_bagel.training.setup.set_up", "matplotlib.backends.backend_agg"):
        importlib.import_module(name)


def open_run(config: Config, has_gpu: bool = False) -> Run:
    """Set the run up on this rank, process groups included."""
    import torch.distributed as dist

    from megatron_bagel.training.setup import set_up as setup

    run = resolved(config, dist.get_world_size(), has_gpu)
    setup.initialize_parallel(run)
    return setup.set_up(run)


def execute(config: Config) -> None:
    """Run to the end on this rank."""
    import torch.distributed as dist

    from megatron_bagel.training.setup import set_up as setup

    setup.execute(resolved(config, dist.get_world_size()))


def run(config: Config, ranks: int = 1) -> list[Mapping[str, Any]]:
    """Run to the end on forked ranks; the records of ``metrics.jsonl``."""
    preload()
    run_ranks(execute, ranks, config, timeout=RUN_TIMEOUT)
    return read_history(Path(config.training.results_dir) / "metrics.jsonl")


def start(config: Config, ranks: int) -> multiprocessing.Process:
    """The same run in a process of its own group of ranks, to be killed."""
    preload()
    return fork(_start_main, config, ranks)


def _start_main(config: Config, ranks: int) -> None:
    import os

    os.setsid()
    run_ranks(execute, ranks, config, timeout=RUN_TIMEOUT)


NUMBERS = ("loss", "ce", "mse", "grad_norm", "lr", "consumed_samples", "consumed_tokens", "ce_tokens", "mse_tokens")


def numbers(history: list[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What must not depend on when, where or how often a run was started."""
    return [tuple(record[name] for name in ("step", *NUMBERS)) for record in history]
