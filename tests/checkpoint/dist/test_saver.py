# SPDX-License-Identifier: Apache-2.0
"""Saves in the background are one at a time: however fast they come, no more than one copy of the state waits for the disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.checkpoint.dist.saver import Saver, SaveSettings
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.dist.write_errors import is_space_short
from tests.checkpoint.tiny_run import tiny_run, train_step
from tests.distributed import run_ranks

SAVES = 4


def _save_after_every_step(directory: Path) -> list[tuple[int, int, str | None]]:
    """After each save began: folders being written, processes that write, and the newest whole checkpoint."""
    trained, seen = tiny_run(), []
    saver = Saver(directory, SaveSettings(background=True))
    for step in range(1, SAVES + 1):
        train_step(trained, step)
        saver.save(step, trained, {"seen": step})
        newest = step_folders.latest_checkpoint(directory)
        writing = [process for process in multiprocessing.active_children() if process.is_alive()]
        seen.append((len(list(directory.glob(".saving-*"))), len(writing), newest and newest.name))
    saver.finish()
    return seen


def test_one_save_is_under_way_at_most(tmp_path: Path) -> None:
    for seen in run_ranks(_save_after_every_step, 2, tmp_path, parallel={}):
        for number, (folders, writers, newest) in enumerate(seen):
            assert folders <= 1 and writers <= 1
            # The one before is whole when the next begins.
            assert newest == (f"{number:07d}" if number else None) or newest == f"{number + 1:07d}"
    assert [CheckpointWeights(folder).state["run"] for folder in step_folders.checkpoints(tmp_path)] == [
        {"seen": step} for step in range(1, SAVES + 1)
    ]


@pytest.mark.parametrize(
    ("error", "free", "short"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 10**12, True),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 10**12, True),
        (RuntimeError("unexpected pos 64 vs 0"), 10**6, True),
        (RuntimeError("unexpected pos 64 vs 0"), 99 * 2**20, True),
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT)), 10**12, False),
        (RuntimeError("unexpected pos 64 vs 0"), 101 * 2**20, False),
    ],
)
def test_space_is_short_only_where_it_can_be_the_reason(tmp_path: Path, error: Exception, free: int, short: bool) -> None:
    newest = tmp_path / "0000002"
    newest.mkdir()
    with (newest / "__0_0.distcp").open("wb") as file:
        file.truncate(100 * 2**20)
    assert is_space_short(free, newest, tmp_path, error) is short
