# SPDX-License-Identifier: Apache-2.0
"""Whole runs with local checkpoints: killed after one that is newer than the last checkpoint, they continue from it bit for bit."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_bagel.config.parser import Config
from tests.faults.conftest import STEPS
from tests.faults.ranks import after_gradients, run_numbers, start_ranks
from tests.runs import numbers, run, run_config
from tests.training.equal_runs import stored_tensors
from tests.waiting import eventually

pytest.importorskip("nvidia_resiliency_ext", reason='nvidia-resiliency-ext is not installed: pip install -e ".[resiliency]"')
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
LOCAL = 5  # the step that is saved locally, one after the last checkpoint and one before the end


def with_local(world: Path, results: Path, **flags: object) -> Config:
    saves = {"save_every": LOCAL - 1, "local_checkpoint_dir": str(results / "local"), "save_local_every": 1}
    return run_config(world, results, 2, **{"total_steps": STEPS, **saves, **flags})


def _stuck_in_step(rank: int) -> None:
    """The step after the local save does not end, so that the kill finds the run there on any machine."""
    after_gradients(lambda model, computation: time.sleep(600) if computation == LOCAL else None)


def notes(results: Path) -> list[Path]:
    return sorted((results / "local").glob(f"*/*/iter_{LOCAL:07d}_*_local.json"))


@pytest.fixture(scope="module")
def killed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run left whose ranks got SIGKILL after the local save. It lies where it was written: the folder is part of its name."""
    results = tmp_path_factory.mktemp("killed") / "run"
    ranks = start_ranks(with_local(world, results), 2, fault=_stuck_in_step)
    eventually(lambda: len(notes(results)) == 2 or not any(process.is_alive() for process in ranks.processes))
    ranks.send(signal.SIGKILL)
    assert ranks.wait() == [-signal.SIGKILL] * 2, ranks.printed()
    shutil.copytree(results, results.parent / "kept")
    return results


@pytest.fixture
def lost(killed: Path) -> Path:
    """The same folder as the kill left it."""
    shutil.rmtree(killed)
    shutil.copytree(killed.parent / "kept", killed)
    return killed


@pytest.fixture(scope="module")
def tensors(world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights, averages and moments at the end of an uninterrupted run without local checkpoints."""
    config = run_config(world, tmp_path_factory.mktemp("straight"), 2, total_steps=STEPS, save_every=STEPS)
    ranks = start_ranks(config, 2)
    assert ranks.wait() == [0, 0], ranks.printed()
    return stored_tensors(Path(config.training.checkpoint_dir) / f"{STEPS:07d}")


def again(config: Config) -> str:
    """The same command once more, to the end; what it said."""
    ranks = start_ranks(config, 2)
    assert ranks.wait() == [0, 0], ranks.printed()
    return ranks.printed()


def assert_same_end(config: Config, straight: list[tuple], tensors: dict[str, torch.Tensor]) -> None:
    assert run_numbers(config) == straight
    ours = stored_tensors(Path(config.training.checkpoint_dir) / f"{STEPS:07d}")
    assert ours.keys() == tensors.keys()
    assert [name for name in tensors if not torch.equal(ours[name], tensors[name])] == []


def test_killed_ranks_continue_from_the_local_step(
    world: Path, lost: Path, straight: list[tuple], tensors: dict[str, torch.Tensor]
) -> None:
    config = with_local(world, lost)
    assert f"continuing from the local checkpoints of step {LOCAL}" in again(config)
    assert_same_end(config, straight, tensors)


@pytest.mark.slow
def test_without_one_ranks_file_the_checkpoint_is_used(
    world: Path, lost: Path, straight: list[tuple], tensors: dict[str, torch.Tensor]
) -> None:
    notes(lost)[1].with_suffix(".pt").unlink()
    config = with_local(world, lost)
    said = again(config)
    assert f"the one of step {LOCAL} in {lost / 'local'} is not used: it is not there for rank 1" in said
    assert f"continuing from {lost / 'checkpoints'}/{LOCAL - 1:07d}" in said
    assert_same_end(config, straight, tensors)


@pytest.mark.slow
def test_on_another_layout_the_checkpoint_is_used(world: Path, lost: Path, straight: list[tuple]) -> None:
    config = with_local(world, lost, tensor_model_parallel_size=2)
    said = again(config)
    assert "is not used: rank 0: it was saved with other parallel sizes" in said
    assert f"continuing from {lost / 'checkpoints'}/{LOCAL - 1:07d}" in said
    for ours, theirs in zip(run_numbers(config), straight, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
def test_a_start_that_resumes_nothing_uses_no_local_one(world: Path, lost: Path, straight: list[tuple]) -> None:
    config = with_local(world, lost, auto_resume=False, overwrite_run=True)
    shutil.rmtree(lost / "checkpoints")
    assert "continuing" not in again(config)
    assert run_numbers(config) == straight


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, {"pipeline_model_parallel_size": 2}, id="pipeline, the tower with an optimizer of its own"),
        pytest.param(2, {"context_parallel_size": 2, "bf16": True}, id="context in bf16"),
        pytest.param(2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, id="overlap"),
        pytest.param(4, {"num_distributed_optimizer_instances": 2, "global_batch_size": 4}, id="two instances"),
        pytest.param(4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, id="tensor and pipeline"),
    ],
)
def test_on_any_layout_the_run_is_the_same(world: Path, tmp_path: Path, ranks: int, flags: dict) -> None:
    constant = {"lr_scheduler": "constant", **flags}
    straight = numbers(run(run_config(world, tmp_path / "straight", ranks, total_steps=4, save_every=4, **constant), ranks))
    local = {"save_every": 4, "local_checkpoint_dir": str(tmp_path / "local"), "save_local_every": 1, **constant}
    run(run_config(world, tmp_path / "parts", ranks, total_steps=2, **local), ranks)
    shutil.rmtree(tmp_path / "parts/checkpoints")
    assert numbers(run(run_config(world, tmp_path / "parts", ranks, total_steps=4, **local), ranks)) == straight
    assert "continuing from the local checkpoints of step 2" in (tmp_path / "parts/log.txt").read_text()
    there, here = (stored_tensors(tmp_path / f"{name}/checkpoints/0000004") for name in ("straight", "parts"))
    assert [name for name in there if not torch.equal(there[name], here[name])] == []
