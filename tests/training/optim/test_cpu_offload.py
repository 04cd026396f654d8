# SPDX-License-Identifier: Apache-2.0
"""The optimizer in host memory: refused where it cannot work, and elsewhere the same run as without it.

There is no GPU here. In the runs Megatron-Core's hybrid optimizer is the real one, and every tensor that has not been copied to the host
counts as one of a GPU.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.offload_rules import check_offload_package
from megatron_bagel.config.parser import Config
from megatron_bagel.config.validate import validate_settings
from megatron_bagel.costs.memory import MemoryModel
from megatron_bagel.training.optim.cpu_offload import offload_settings
from megatron_bagel.training.setup import set_up as setup
from tests.distributed import run_ranks
from tests.runs import numbers, read_history, resolved, run, run_config
from tests.training.equal_runs import SETTINGS, stored_tensors, world_of

OFFLOAD = {"optimizer_cpu_offload": True}

REFUSED = {
    "no GPU": (OFFLOAD, False, "on CPU it is there already.*megatron-bagel plan"),
    "fp32": ({**OFFLOAD, "bf16": False}, True, "needs --bf16"),
    "whole optimizer": ({**OFFLOAD, "use_distributed_optimizer": False}, True, "needs --use_distributed_optimizer"),
    "dry run": ({**OFFLOAD, "dry_run": True}, True, "has no dry run"),
    "a fraction of nothing": ({"optimizer_offload_fraction": 0.5}, True, "--optimizer_offload_fraction needs --optimizer_cpu_offload"),
    "fraction 0": ({**OFFLOAD, "optimizer_offload_fraction": 0.0}, True, "optimizer_offload_fraction is 0.0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_cannot_work_are_refused(name: str) -> None:
    flags, has_gpu, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        validate_settings(Config.from_values({"dataset_config_file": "data.yaml", **flags}), 1, has_gpu)


@pytest.mark.skipif(find_spec("transformer_engine") is not None, reason="the package is there")
def test_a_run_needs_the_package_that_megatron_asks_for() -> None:
    with pytest.raises(ValueError, match="needs the package transformer-engine"):
        check_offload_package(MegatronArguments(optimizer_cpu_offload=True))


class HostTensor(torch.Tensor):
    """A tensor that was copied to the host. Everything that is computed from it is one too."""


def _pretend_gpu() -> None:
    """Tell tensors of a GPU from those of the host in this process."""
    tensor: Any = torch.Tensor
    to_host = tensor.cpu
    tensor.cpu = lambda self: to_host(self).as_subclass(HostTensor)
    tensor.pin_memory = lambda self: self
    tensor.is_cuda = property(_is_cuda)
    # Megatron-Core compares Transformer Engine's version, which is not installed here, with what its own optimizers need.
    optimizer_config: Any = sys.modules["megatron.core.optimizer.optimizer_config"]
    optimizer_config.is_te_min_version = lambda *_, **__: True


def _is_cuda(tensor: torch.Tensor) -> bool:
    """Whether the hybrid optimizer, and nobody else, takes a tensor for one of a GPU."""
    caller = sys._getframe(1).f_code.co_filename
    return caller.endswith("hybrid_optimizer.py") and not isinstance(tensor, HostTensor)


def _execute(config: Config, fraction: float) -> None:
    run = resolved(config)
    if fraction:
        _pretend_gpu()
        run = replace(run, optimizer=replace(run.optimizer, offload_fraction=fraction, overlap_offload=True))
    setup.execute(run)


FLAGS = {**SETTINGS, "bf16": True, "total_steps": 4, "save_every": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world, and in it the run without offload."""
    world = world_of(tmp_path_factory.mktemp("world"))
    run(run_config(world, world / "plain", **FLAGS))
    return world


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_a_run_in_host_memory_is_the_run_without(plain: Path, tmp_path: Path, fraction: float) -> None:
    """Losses, clipped gradients, weights, moments and average; after resumes from one to the other and to itself too."""
    wanted = numbers(read_history(plain / "plain/metrics.jsonl"))
    stored = stored_tensors(plain / "plain/checkpoints/0000004")
    offloaded = tmp_path / "offloaded"
    runs = (("offloaded", None, fraction), ("there", offloaded, 0.0), ("back", plain / "plain", fraction), ("again", offloaded, fraction))
    for name, start, share in runs:
        middle = {} if start is None else {"resume_from": str(start / "checkpoints/0000002"), "init_random": False}
        run_ranks(_execute, 1, run_config(plain, tmp_path / name, **FLAGS, **middle), share, timeout=400)
        found = numbers(read_history(tmp_path / name / "metrics.jsonl"))
        assert len(found) == (4 if start is None else 2)
        for ours, theirs in zip(found, wanted[-len(found) :], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5), name
        tensors = stored_tensors(tmp_path / name / "checkpoints/0000004")
        assert tensors.keys() == stored.keys()
        for key, tensor in stored.items():
            torch.testing.assert_close(
                tensors[key], tensor, atol=1e-6, rtol=1e-5, msg=lambda text, key=key, name=name: f"{name} {key}: {text}"
            )


def test_megatron_takes_the_settings_and_plans_move_them_to_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the formula takes from the GPU is on the host, with the host's copy of gradients beside it."""
    from megatron.core.optimizer import OptimizerConfig

    monkeypatch.setattr("megatron.core.optimizer.optimizer_config.is_te_min_version", lambda *_, **__: True)
    made = OptimizerConfig(optimizer="adam", bf16=True, use_distributed_optimizer=True, **offload_settings(0.5, True))
    assert made.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and made.optimizer_offload_fraction == 0.5
    costs = resolved(run_config(world_of(tmp_path), tmp_path / "run", bf16=True)).costs
    plain = MemoryModel(costs).rank(0)
    for fraction in (0.25, 1.0):
        megatron = replace(costs.megatron, optimizer_cpu_offload=True, optimizer_offload_fraction=fraction)
        moved = MemoryModel(replace(costs, megatron=megatron)).rank(0)
        assert moved.optimizer_bytes == pytest.approx((1 - fraction) * plain.optimizer_bytes, abs=8)
        assert moved.average_bytes == pytest.approx((1 - fraction) * plain.average_bytes, abs=8)
        assert moved.host_bytes == pytest.approx(fraction * (plain.trained * 4 + plain.optimizer_bytes + plain.average_bytes), abs=32)
        assert (moved.weight_bytes, moved.gradient_bytes, plain.host_bytes) == (plain.weight_bytes, plain.gradient_bytes, 0)
