# SPDX-License-Identifier: Apache-2.0
"""Restarts in the same processes, by the real nvidia-resiliency-ext over gloo: an error of all ranks, and the run goes on bit for bit.

One of a single rank needs groups that can be aborted, which NCCL's can and gloo's cannot.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.config.parser import Config
from tests.faults.conftest import STEPS
from tests.faults.ranks import after_gradients, run_numbers, start_ranks
from tests.runs import run_config

pytest.importorskip("nvidia_resiliency_ext", reason='nvidia-resiliency-ext is not installed: pip install -e ".[resiliency]"')
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def restarting(world: Path, results: Path, restarts: int) -> Config:
    return run_config(world, results, 2, total_steps=STEPS, save_every=2, inprocess_restarts=restarts)


def _errors(*computations: int) -> object:
    """All ranks fail in these computations of gradients, counted over the attempts of a process."""

    def fail(model: object, computation: int) -> None:
        if computation in computations:
            raise RuntimeError(f"made up, in computation {computation}")

    return lambda rank: after_gradients(fail)


def reports(config: Config) -> list[str]:
    return [path.read_text() for path in sorted((Path(config.training.results_dir) / "errors").glob("*.txt"))]


@pytest.mark.slow
def test_an_error_of_all_ranks_starts_them_again_in_the_same_processes(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = restarting(world, tmp_path, 1)
    ranks = start_ranks(config, 2, fault=_errors(3))
    assert ranks.wait(150) == [0, 0], ranks.printed()
    assert f"continuing from {tmp_path / 'checkpoints'}/0000002" in ranks.printed()
    assert "megatron_bagel.train: done after 1 restarts in the same processes" in ranks.printed()
    (report,) = reports(config)
    assert "made up, in computation 3" in report.splitlines()[0]
    assert run_numbers(config) == straight


@pytest.mark.slow
def test_one_error_too_many_ends_the_run(world: Path, tmp_path: Path) -> None:
    config = restarting(world, tmp_path, 1)
    ranks = start_ranks(config, 2, fault=_errors(3, 5))
    assert ranks.wait(150) == [1, 1], ranks.printed()
    assert len(reports(config)) == 2
