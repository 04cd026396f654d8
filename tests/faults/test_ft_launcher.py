# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's ft_launcher itself: a rank is stopped, its monitor ends it for want of heartbeats, and the run starts again and continues."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from tests.faults.conftest import STEPS
from tests.faults.ranks import launched_until_saved, run_numbers
from tests.runs import run_config

pytest.importorskip("nvidia_resiliency_ext", reason='nvidia-resiliency-ext is not installed: pip install -e ".[resiliency]"')
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

# Seconds without a heartbeat: a step and a save take a few, on a busy machine too. Our own watchdog waits for minutes.
LAUNCH = "--standalone --nproc-per-node 2 --max-restarts 2 --ft-rank-heartbeat-timeout 20 --ft-workload-check-interval 1"


@pytest.mark.slow
def test_the_monitor_ends_a_rank_that_is_stopped_and_the_run_continues(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = run_config(world, tmp_path, 2, total_steps=STEPS, save_every=2, auto_resume=False)
    config.save(tmp_path / "run.yaml")
    command = ["-m", "nvidia_resiliency_ext.fault_tolerance.launcher", *LAUNCH.split()]
    command += ["-m", "megatron_bagel.train", "--config", str(tmp_path / "run.yaml"), "--ft_heartbeats", "True"]
    process, victim = launched_until_saved(command, tmp_path, 200)
    victim.send_signal(signal.SIGSTOP)
    code = process.wait(350)
    text = (tmp_path / "printed.txt").read_text()
    assert code == 0, text
    # Only SIGKILL ends a process that SIGSTOP stopped, and nobody but its monitor sent one.
    assert not psutil.pid_exists(victim.pid)
    assert "Did not get subsequent heartbeat" in text
    assert "started again by the launcher (restart 1)" in text and "continuing from" in text
    assert run_numbers(config) == straight
