# SPDX-License-Identifier: Apache-2.0
"""A run prints its own lines and nothing of other packages. One line names absent speed-ups, and unlisted warnings are shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from megatron_bagel.cli import console
from tests.runs import make_world, run_config

LOG_LINE = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] .+")


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_prints_only_its_own_lines(tmp_path: Path, processes: int) -> None:
    config = tmp_path / "run.yaml"
    flags = {"global_batch_size": 2, "total_steps": 2, "auto_resume": False}
    run_config(make_world(tmp_path), tmp_path / "results", processes, **flags).save(config)
    # The launcher is torch's own program: it imports torch before this package, and only the environment can reach it.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:The pynvml package is deprecated:FutureWarning"}
    command = [sys.executable, *launcher, "-m", "megatron_bagel.train", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines and [line for line in lines if not LOG_LINE.fullmatch(line)] == []
    speedups = console.absent_speedups()
    assert [line.partition("] ")[2] for line in lines if "speed-ups" in line] == ([] if speedups is None else [speedups])


def test_unknown_warnings_are_shown() -> None:
    with warnings.catch_warnings(record=True) as caught:
        console.quiet()
        warnings.warn("The pynvml package is deprecated. Please install nvidia-ml-py", FutureWarning, stacklevel=1)
        warnings.warn("a warning of tomorrow", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["a warning of tomorrow"]


def test_absent_speedups_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert console.absent_speedups() == "optional speed-ups for GPUs not installed: transformer-engine, apex"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert console.absent_speedups() is None
