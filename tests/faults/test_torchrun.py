"""torchrun itself: a rank is killed once, torchrun starts all again, and the run continues from its checkpoint without being told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_bagel.checkpoint.publish import latest_checkpoint
from tests.conftest import ROOT
from tests.faults.conftest import STEPS
from tests.faults.ranks import launched_rank, run_numbers
from tests.runs import run_config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.mark.slow
def test_a_restart_by_torchrun_continues_by_itself(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = run_config(world, tmp_path, 2, total_steps=STEPS, save_every=1, auto_resume=False)
    config.save(tmp_path / "run.yaml")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    command = [sys.executable, *launch, "-m", "megatron_bagel.train", "--config", str(tmp_path / "run.yaml")]
    with (tmp_path / "printed.txt").open("w") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=printed, stderr=printed)
    launcher, deadline = psutil.Process(process.pid), time.monotonic() + 400
    while latest_checkpoint(tmp_path / "checkpoints") is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    victim = launched_rank(launcher, 1)
    assert victim is not None, (tmp_path / "printed.txt").read_text()
    victim.send_signal(signal.SIGKILL)
    assert process.wait(500) == 0, (tmp_path / "printed.txt").read_text()
    text = (tmp_path / "printed.txt").read_text()
    assert "started again by the launcher (restart 1)" in text and "continuing from" in text
    assert "nothing from rank 1: killed" in text
    assert run_numbers(config) == straight
