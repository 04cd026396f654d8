"""Takes the folders of a run before anything is built: they belong to one run, and one process writes into them at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_bagel.assembly.starting_weights import StartSettings
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.training.setup.claim import Claim, RefusedFolders, claim_folders
from megatron_bagel.training.setup.launcher_restarts import forget_refusal, note_refusal, resume_after_restart


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

    Raises ValueError on all ranks if they hold a run that this start does not continue.
    """
    start = resume_after_restart(start, results_dir)
    claim = on_first_rank(lambda: _claim(start, results_dir), "the run cannot start")
    start = replace(start, run_id=claim.identity.run_id)
    yield RunFolders(start, claim.identity.run_id, claim.notes)


def _claim(start: StartSettings, results_dir: Path) -> Claim:
    try:
        claim = claim_folders(start, results_dir)
    except RefusedFolders as refusal:
        note_refusal(results_dir, str(refusal))
        raise
    forget_refusal(results_dir)
    return claim
