# SPDX-License-Identifier: Apache-2.0
"""What is wrong with the command line is printed once, however many ranks meet it, and by the rank that meets it alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.distributed


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **variables}


def test_an_error_of_all_ranks_is_printed_once() -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "megatron_bagel.train"]
    done = subprocess.run(
        [sys.executable, *launcher, "--learning_rate", "1"], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode
    assert done.stderr.count("there is no flag --learning_rate; did you mean --lr?") == 1


def test_an_error_of_one_rank_alone_is_printed_with_its_rank(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_bagel.train", "--config", str(tmp_path / "absent.yaml")]
    done = subprocess.run(command, cwd=ROOT, env=environment(RANK="1", WORLD_SIZE="2"), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert "megatron_bagel.train: error: on rank 1 (" in done.stderr and "there is no file" in done.stderr
