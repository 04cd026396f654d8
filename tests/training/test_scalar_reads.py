# SPDX-License-Identifier: Apache-2.0
"""A step reads numbers from the device only to judge itself: the reads do not grow with its packs, as each stops the host on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_bagel.config.parser import Config
from tests.distributed import run_ranks
from tests.runs import make_world, open_run, run_config

pytestmark = pytest.mark.distributed


class ScalarReads(TorchDispatchMode):
    """Counts what ``item``, ``float``, ``int`` and ``bool`` of a tensor come to."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads(config: Config) -> list[int]:
    """The reads of the first three steps."""
    from megatron_bagel.training.step import train_step

    run = open_run(config)
    counts = []
    for _ in range(3):
        batch = next(run.loader)
        with ScalarReads() as mode:
            train_step(run.trainable, batch, run.settings)
        counts.append(mode.count)
    run.loader.close()
    return counts


def test_scalar_reads_do_not_grow_with_the_packs(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world")
    counts = [
        run_ranks(reads, 1, run_config(world, tmp_path / str(packs), global_batch_size=packs, **flags))[0]
        for packs, flags in ((1, {}), (4, {}), (4, {"encoder_memory": "constant", "encoder_chunk_tokens": 30, "ce_chunk_tokens": 8}))
    ]
    # The same two of every step, whatever its packs.
    assert counts == [[2, 2, 2]] * 3
    counter = ScalarReads()
    with counter:
        float(torch.ones(())), torch.ones(1).item(), bool(torch.ones(()))
    assert counter.count == 3
