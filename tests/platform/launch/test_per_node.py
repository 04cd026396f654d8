# SPDX-License-Identifier: Apache-2.0
"""One rank of each node works while the others wait in the store; nobody goes on before all nodes are done, and failures reach all."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_bagel.platform.launch.per_node import on_one_rank_per_node
from tests.distributed import run_ranks


def _on_two_nodes(folder: Path, fails: bool) -> tuple[list[str], list[str], list[str]] | str:
    rank = dist.get_rank()
    os.environ.update(GROUP_RANK=str(rank // 2), LOCAL_RANK=str(rank % 2))

    def work(decided: list[str]) -> list[str]:
        if rank == 2:
            time.sleep(1)
            if fails:
                raise ValueError("the disk of node 1 is full")
        (folder / f"{rank} works on {decided[0]}").touch()
        return [f"made on node {rank // 2}"]

    try:
        decided, made = on_one_rank_per_node(lambda: [f"commit of rank {rank}"], work, "fails" if fails else "works")
    except ValueError as error:
        return str(error)
    # Whoever goes on now meets nobody in a collective who still works.
    return decided, made, sorted(file.name for file in folder.iterdir())


def _both(folder: Path) -> list[object]:
    return [_on_two_nodes(folder, fails) for fails in (False, True)]


@pytest.mark.distributed
def test_one_rank_of_each_node_works_and_all_wait_for_the_slowest(tmp_path: Path) -> None:
    results = run_ranks(_both, 3, tmp_path)
    for rank, (worked, failed) in enumerate(results):
        done = [f"{worker} works on commit of rank 0" for worker in (0, 2)]
        assert worked == (["commit of rank 0"], [f"made on node {rank // 2}"], done)
        assert failed == "the disk of node 1 is full"


@pytest.mark.usefixtures("single_rank")
def test_a_world_of_one_rank_works_itself() -> None:
    assert on_one_rank_per_node(lambda: ["a"], lambda decided: [*decided, "b"], "alone") == (["a"], ["a", "b"])
