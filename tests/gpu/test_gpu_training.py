# SPDX-License-Identifier: Apache-2.0
"""The training command on a GPU over NCCL: the numbers of a CPU in fp32, near them in bf16, the same again after a restart."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.data.transforms import Normalization, RawImage, RawPatches, ready_images, ready_patches, vit_patches
from tests.gpu.commands import ROOT, run, settings_file, train
from tests.runs import make_world

NUMBERS = ("loss", "ce", "mse", "grad_norm")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def on_cpu(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    return numbers(train(world, tmp_path_factory.mktemp("cpu"), gpu=False))


@pytest.fixture(scope="module")
def in_bf16(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    return numbers(train(world, tmp_path_factory.mktemp("bf16"), bf16=True))


def numbers(history: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    return [[record[name] for name in NUMBERS] for record in history]


def close(ours: list[list[float]], theirs: list[list[float]], relative: float) -> None:
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=relative)


FP32 = {
    "flex": {},
    "sdpa": {"attention_backend": "sdpa"},
    "torchrun-overlap": {"launcher": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    "overlap-vae-encode": {"overlap_vae_encode": True},
    "compiled-kernels": {"fused_kernels": "compiled"},
    "recompute": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1, "recompute_vit": True},
}


@pytest.mark.parametrize("flags", FP32.values(), ids=FP32)
def test_fp32_equals_the_cpu(world: Path, on_cpu: list[list[float]], tmp_path: Path, flags: dict[str, Any]) -> None:
    close(numbers(train(world, tmp_path, **flags)), on_cpu, 1e-4)


def test_bf16_is_near(on_cpu: list[list[float]], in_bf16: list[list[float]]) -> None:
    """The default on a GPU. Losses within 1 %, gradient norms within 5 %."""
    close([row[:3] for row in in_bf16], [row[:3] for row in on_cpu], 1e-2)
    close([row[3:] for row in in_bf16], [row[3:] for row in on_cpu], 5e-2)


@pytest.mark.parametrize("flags", [{}, {"async_save": True}], ids=["waiting", "background"])
def test_a_stopped_run_goes_on(world: Path, in_bf16: list[list[float]], tmp_path: Path, flags: dict[str, Any]) -> None:
    """Two steps, and two more from the checkpoint, are the run of four. The kernels add in any order, so not to the last bit."""
    train(world, tmp_path, bf16=True, total_steps=2, **flags)
    close(numbers(train(world, tmp_path, bf16=True, **flags)), in_bf16, 1e-3)


def test_every_watcher_at_once(world: Path, tmp_path: Path) -> None:
    """Validation with pictures, the profiler, timers and Prometheus, exports: what touches the device besides the step."""
    history = train(
        world, tmp_path, bf16=True, split="75,25", eval_every=2, eval_samples=4, eval_pictures=2, eval_timesteps=3, eval_answer_tokens=4,
        profile=True, prometheus_file=tmp_path / "metrics.prom", export_hf_every=4, profile_step_start=1, profile_step_end=3,
    )  # fmt: skip
    assert history[-1]["peak_mem_bytes"] > 0 and history[-1]["step_time_s"] > 0
    made = ("validation.jsonl", "samples/0000004_*.png", "metrics.prom", "hf/0000004/ema.safetensors", "traces/*.json.gz")
    assert [pattern for pattern in made if not list(tmp_path.glob(pattern))] == []


@pytest.mark.parametrize("flags", [{}, {"attention_backend": "sdpa", "bf16": True, "ce_chunk_tokens": 8, "one_pass_optimizer": True}])
def test_a_step_waits_only_to_be_judged(world: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    """The norms of the gradients and the losses are read, whatever the packs of the step."""
    waits = {}
    for packs in (2, 6):
        file = settings_file(world, tmp_path / str(packs), global_batch_size=packs, log_every=100, **flags)
        waits[packs] = json.loads(run("tests.gpu.step_waits", str(file)).splitlines()[-1])
    assert waits[2] == waits[6] and 1 <= len(waits[6]) <= 4, waits


def test_processes_without_a_gpu_of_their_own_are_refused(world: Path, tmp_path: Path) -> None:
    """NCCL would fail later, in words of its own."""
    count = torch.cuda.device_count()
    train(world, tmp_path, total_steps=1)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count + 1), "-m", "megatron_bagel.train"]
    command = [sys.executable, *command, "--config", str(tmp_path / "flags.yaml")]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode != 0 and f"--nproc_per_node {count}" in refused.stderr


@pytest.mark.parametrize("mean, std", [((0.5, 0.4, 0.3), (0.5, 0.2, 0.1)), ((0.45, 0.45, 0.45), (0.3, 0.3, 0.3))])
def test_pictures_reach_the_gpu_without_a_wait(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """The same bits as on a CPU. torch raises where the host would wait for the device."""
    raw = RawImage(torch.randint(0, 256, (56, 42, 3), dtype=torch.uint8), Normalization(mean, std))
    patches = RawPatches(vit_patches(raw.values.permute(2, 0, 1), 14), raw.normalization)
    ready_images([raw], "cuda"), ready_patches([patches], 588, "cuda")  # copies mean and deviation once
    torch.cuda.set_sync_debug_mode("error")
    try:
        (image,), rows = ready_images([raw], "cuda"), ready_patches([patches, patches], 588, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(image.cpu(), ready_images([raw], "cpu")[0])
    assert torch.equal(rows.cpu(), ready_patches([patches, patches], 588, "cpu"))
