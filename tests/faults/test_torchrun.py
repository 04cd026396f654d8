# SPDX-License-Identifier: Apache-2.0
"""torchrun itself: a rank is killed once, torchrun starts all again, and the run continues from its checkpoint without being told to."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.conftest import STEPS
from tests.faults.ranks import launched_until_saved, run_numbers
from tests.runs import run_config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.mark.slow
def test_a_restart_by_torchrun_continues_by_itself(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = run_config(world, tmp_path, 2, total_steps=STEPS, save_every=1, auto_resume=False)
    config.save(tmp_path / "run.yaml")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    process, victim = launched_until_saved([*launch, "-m", "megatron_bagel.train", "--config", str(tmp_path / "run.yaml")], tmp_path)
    victim.send_signal(signal.SIGKILL)
    assert process.wait(500) == 0, (tmp_path / "printed.txt").read_text()
    text = (tmp_path / "printed.txt").read_text()
    assert "started again by the launcher (restart 1)" in text and "continuing from" in text
    assert "nothing from rank 1: killed" in text
    assert run_numbers(config) == straight
