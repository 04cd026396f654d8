# SPDX-License-Identifier: Apache-2.0
"""One rank of each node works while the others wait, also for longer than a collective may take; failures reach all ranks."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_bagel.platform.launch.per_node import on_one_rank_per_node
from tests.distributed import run_ranks


def _on_two_nodes(log: Path, fails: bool) -> tuple[list[str], list[str]] | str:
    rank = dist.get_rank()
    os.environ.update(GROUP_RANK=str(rank // 2), LOCAL_RANK=str(rank % 2))
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)

    def work(decided: list[str]) -> list[str]:
        with log.open("a") as file:
            file.write(f"{rank} works on {decided[0]}\n")
        if rank == 2:
            time.sleep(3)
            if fails:
                raise ValueError("the disk of node 1 is full")
        return [f"made on node {rank // 2}"]

    try:
        results = on_one_rank_per_node(lambda: [f"commit of rank {rank}"], work, "fails" if fails else "works")
        # The next collective is within its second on every rank.
        dist.all_reduce(torch.ones(1))
    except ValueError as error:
        return str(error)
    return results


def _both(folder: Path) -> list[object]:
    return [_on_two_nodes(folder / "log", fails) for fails in (False, True)]


@pytest.mark.distributed
def test_one_rank_of_each_node_works_and_a_slow_node_times_nobody_out(tmp_path: Path) -> None:
    results = run_ranks(_both, 3, tmp_path)
    for rank, (worked, failed) in enumerate(results):
        assert worked == (["commit of rank 0"], [f"made on node {rank // 2}"])
        assert failed == "the disk of node 1 is full"
    assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(2 * [f"{rank} works on commit of rank 0" for rank in (0, 2)])


@pytest.mark.usefixtures("single_rank")
def test_a_world_of_one_rank_works_itself() -> None:
    assert on_one_rank_per_node(lambda: ["a"], lambda decided: [*decided, "b"], "alone") == (["a"], ["a", "b"])
