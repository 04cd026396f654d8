# SPDX-License-Identifier: Apache-2.0
"""A rehearsal of several hosts: one is cut off in the middle of a step, the others say so, and the run continues bit for bit."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.hosts import Hosts, hosts
from tests.faults.ranks import after_gradients, run_numbers, start_ranks, wait_for_steps
from tests.runs import run_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("count", [2, 4])
def test_a_host_is_cut_off(world: Path, tmp_path: Path, count: int) -> None:
    flags = {"total_steps": 6, "save_every": 2, "global_batch_size": count, "hang_timeout_minutes": 0.5}
    with hosts(count) as network:
        whole = run_config(world, tmp_path / "whole", count, **flags)
        _to_the_end(network, whole, count)
        cut = run_config(world, tmp_path / "cut", count, **flags)
        ranks = start_ranks(cut, count, fault=lambda rank: _slowly(network, rank), environment=network.environment())
        wait_for_steps(cut, 3, ranks)
        network.pull(count - 1)
        codes = ranks.wait(300)
        assert codes == [18] * count, ranks.printed()
        (report,) = (tmp_path / "cut/errors").glob("hang-*.txt")
        text = report.read_text()
        assert f"rank {count - 1} (" in text and "its host cannot be reached" in text and "in step" in text
        assert text.count("does not answer") == 1, text
        assert "this host is cut off" in (ranks.out / f"rank-{count - 1}.txt").read_text()
        assert len(run_numbers(cut)) < 6
        network.plug(count - 1)
        _to_the_end(network, cut, count)
        assert run_numbers(cut) == run_numbers(whole)


def _slowly(network: Hosts, rank: int) -> None:
    """A rank on its host whose steps take a while, so that the cable is pulled inside one."""
    network.enter(rank)
    after_gradients(lambda model, computation: time.sleep(1))


def _to_the_end(network: Hosts, config: object, count: int) -> None:
    ranks = start_ranks(config, count, fault=network.enter, environment=network.environment())
    assert ranks.wait(300) == [0] * count, ranks.printed()
