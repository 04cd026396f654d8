# SPDX-License-Identifier: Apache-2.0
"""Takes the folders of a run before anything is built: they belong to one run, and one process writes into them at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bagel.assembly.starting_weights import StartSettings
from megatron_bagel.common.writable import check_writable
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.training.resilience.run_lock import RunLock
from megatron_bagel.training.setup.claim import Claim, RefusedFolders, claim_folders
from megatron_bagel.training.setup.launcher_restarts import forget_refusal, note_refusal, restart_note, resume_after_restart

CANNOT_START = "the run cannot start"
logger = logging.getLogger(__name__)


def nothing_to_check() -> None:
    """Stand for the check of a run that no other can disturb."""


@dataclass(frozen=True)
class RunFolders:
    """The folders of a run while this process has them.

    Attributes:
        start: Where the run starts; a restart by the launcher continues.
        run_id: The run's identity; empty for a run that took no folders.
        notes: Sentences for the log.
        check: Raises ValueError, on rank 0, when another process has taken the folders.
    """

    start: StartSettings
    run_id: str = ""
    notes: tuple[str, ...] = ()
    check: Callable[[], None] = nothing_to_check


@contextmanager
def taken_folders(start: StartSettings, results_dir: Path) -> Iterator[RunFolders]:
    """Take both folders while the block runs. Collective.

    Raises ValueError on all ranks if another process writes into them, or if they hold a run that this start does not continue.
    """
    locks = RunLocks(start.checkpoint_dir, results_dir)
    try:
        on_first_rank(locks.check_writable, CANNOT_START)
        on_first_rank(locks.acquire, CANNOT_START)
        restarted = resume_after_restart(start, results_dir)
        notes = (restart_note(),) if restarted is not start else ()
        start = restarted
        claim = on_first_rank(lambda: _claim(start, results_dir), CANNOT_START)
        start = replace(start, run_id=claim.identity.run_id)
        yield RunFolders(start, claim.identity.run_id, (*notes, *claim.notes), locks.check)
    finally:
        locks.release()


class RunLocks:
    """The locks of both folders of a run; one lock where they are one folder. Rank 0 takes them."""

    def __init__(self, checkpoint_dir: Path, results_dir: Path) -> None:
        self._folders = {checkpoint_dir.resolve(): "--checkpoint_dir", results_dir.resolve(): "--results_dir"}
        self._locks: list[RunLock] = []

    def check_writable(self) -> None:
        """Raise ValueError if files cannot be written into one of the folders."""
        for folder, flag in self._folders.items():
            check_writable(folder, flag)

    def acquire(self) -> None:
        """Take both. Raises ValueError if another process holds one of them."""
        for folder, flag in self._folders.items():
            lock = RunLock(folder, flag)
            lock.acquire()
            self._locks.append(lock)

    def check(self) -> None:
        """Raise ValueError if another process has taken one of them."""
        for lock in self._locks:
            lock.check()

    def release(self) -> None:
        """Give back those that this process took. A file system that is gone keeps its lock, which the next run finds unused."""
        for lock in self._locks:
            try:
                lock.release()
            except OSError as error:
                logger.warning("the lock of a folder could not be removed: %s", error)
        self._locks.clear()


def _claim(start: StartSettings, results_dir: Path) -> Claim:
    try:
        claim = claim_folders(start, results_dir)
    except RefusedFolders as refusal:
        note_refusal(results_dir, str(refusal))
        raise
    forget_refusal(results_dir)
    return claim
