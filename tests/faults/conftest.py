# SPDX-License-Identifier: Apache-2.0
"""One small world for all faults, and what a run of two ranks on it gives when nothing goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.ranks import run_numbers, start_ranks
from tests.runs import make_world, run_config

STEPS = 6


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """The numbers of six uninterrupted steps on two ranks."""
    config = run_config(world, tmp_path_factory.mktemp("straight"), 2, total_steps=STEPS, save_every=2)
    ranks = start_ranks(config, 2)
    assert ranks.wait() == [0, 0], ranks.printed()
    return run_numbers(config)
