# SPDX-License-Identifier: Apache-2.0
"""Which run a start belongs to, by what its folders hold. One rank decides, before anything is written into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_bagel.assembly.opened_model import checkpoint_at
from megatron_bagel.assembly.starting_weights import StartSettings
from megatron_bagel.checkpoint.dist.step_folders import step_of
from megatron_bagel.checkpoint.dist.stored_run import stored_run, trained_steps
from megatron_bagel.training.resilience.run_identity import RunIdentity
from megatron_bagel.training.setup.set_aside import set_checkpoints_aside, set_results_aside

METRICS = "metrics.jsonl"


class RefusedFolders(ValueError):
    """The folders hold an earlier run, and nothing says what is to become of it."""


@dataclass(frozen=True)
class Claim:
    """The run that a start belongs to, and sentences about it for the log."""

    identity: RunIdentity
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EarlierFiles:
    """What the folders of a start hold already.

    Attributes:
        steps: Step folders that a run has trained, by rising step.
        has_metrics: Whether steps are logged in results_dir.
        checkpoints_run: The run that checkpoint_dir names.
        results_run: The run that results_dir names.
    """

    steps: list[Path]
    has_metrics: bool
    checkpoints_run: RunIdentity | None
    results_run: RunIdentity | None

    @classmethod
    def of(cls, checkpoint_dir: Path, results_dir: Path) -> EarlierFiles:
        """Look into the folders."""
        metrics = results_dir / METRICS
        has_metrics = metrics.is_file() and metrics.stat().st_size > 0
        return cls(trained_steps(checkpoint_dir), has_metrics, RunIdentity.read(checkpoint_dir), RunIdentity.read(results_dir))


def claim_folders(start: StartSettings, results_dir: Path) -> Claim:
    """Decide which run this start belongs to, and write its identity into both folders.

    Raises:
        RefusedFolders: The folders hold an earlier run that this start neither continues nor moves aside.
        ValueError: The two folders hold two different runs.
    """
    notes = _overwrite(start, results_dir) if start.overwrite else ()
    earlier = EarlierFiles.of(start.checkpoint_dir, results_dir)
    source = _continued_checkpoint(start)
    if start.auto_resume and earlier.steps:
        claim = Claim(_run_in(start.checkpoint_dir, earlier))
        _refuse_other_results(start, results_dir, earlier, claim.identity)
    elif source is not None and source in earlier.steps:
        _refuse_later_steps(start, source, earlier)
        claim = Claim(_run_in(start.checkpoint_dir, earlier))
        _refuse_other_results(start, results_dir, earlier, claim.identity)
    elif earlier.steps:
        raise RefusedFolders(_refusal(f"--checkpoint_dir {start.checkpoint_dir} holds checkpoints", f"the newest is {earlier.steps[-1]}"))
    elif source is not None:
        claim = _claim_for_other_checkpoint(start, source, results_dir, earlier)
    else:
        claim = _claim_for_beginning(start, results_dir, earlier)
    for folder in (results_dir, start.checkpoint_dir):
        claim.identity.write(folder)
    return Claim(claim.identity, (*notes, *claim.notes))


def _overwrite(start: StartSettings, results_dir: Path) -> tuple[str, ...]:
    source = start.resume_from
    if source is not None and source.resolve() in [path.resolve() for path in trained_steps(start.checkpoint_dir)]:
        raise ValueError(
            f"--overwrite_run would move --resume_from {source} aside, which this run starts from; choose another --checkpoint_dir"
        )
    moved = set_checkpoints_aside(start.checkpoint_dir), set_results_aside(results_dir)
    return tuple(f"--overwrite_run: {sentence}" for sentence in moved if sentence)


def _continued_checkpoint(start: StartSettings) -> Path | None:
    """Return the checkpoint that ``--resume_from`` continues in full, as ``trained_steps`` spells it if it is in checkpoint_dir."""
    if start.resume_from is None or start.model_only:
        return None
    checkpoint = checkpoint_at(start.resume_from)
    if checkpoint is not None and checkpoint.parent.resolve() == start.checkpoint_dir.resolve():
        return start.checkpoint_dir / checkpoint.name
    return checkpoint


def _run_in(checkpoint_dir: Path, earlier: EarlierFiles) -> RunIdentity:
    """Return the run whose checkpoints these are. Those of earlier versions name none and are adopted."""
    if earlier.checkpoints_run is not None:
        return earlier.checkpoints_run
    named = [run_id for folder in reversed(earlier.steps) if (run_id := stored_run(folder).run_id)]
    return RunIdentity(named[0]) if named else earlier.results_run or RunIdentity.new()


def _claim_for_other_checkpoint(start: StartSettings, source: Path, results_dir: Path, earlier: EarlierFiles) -> Claim:
    """A run that continues a checkpoint of another folder is a run of its own. It may go on in the results of the run it continues."""
    followed = stored_run(source).run_id
    if earlier.has_metrics and earlier.results_run is not None and earlier.results_run.run_id != followed:
        same_start = earlier.checkpoints_run == earlier.results_run and earlier.results_run.follows == followed
        if not same_start:
            raise RefusedFolders(_refusal(f"--results_dir {results_dir} holds the metrics", f"--resume_from {source} is of another one"))
        return Claim(earlier.results_run)
    return Claim(RunIdentity.new(followed))


def _claim_for_beginning(start: StartSettings, results_dir: Path, earlier: EarlierFiles) -> Claim:
    """A run at its first step. With auto_resume, an earlier start may have ended before its first save, or its checkpoints were removed."""
    if start.auto_resume and earlier.checkpoints_run is not None and earlier.checkpoints_run == earlier.results_run:
        return Claim(earlier.results_run)
    if not earlier.has_metrics:
        return Claim(RunIdentity.new())
    if not start.auto_resume:
        raise RefusedFolders(_refusal(f"--results_dir {results_dir} holds the metrics", f"{results_dir / METRICS}", continuing=False))
    moved = set_results_aside(results_dir)
    return Claim(RunIdentity.new(), (f"--checkpoint_dir {start.checkpoint_dir} has no checkpoint to continue: {moved}",))


def _refuse_later_steps(start: StartSettings, source: Path, earlier: EarlierFiles) -> None:
    later = [folder for folder in earlier.steps if step_of(folder) > step_of(source)]
    if later:
        raise RefusedFolders(
            f"--resume_from {source}: --checkpoint_dir {start.checkpoint_dir} also holds later checkpoints of that run (the newest is "
            f"{later[-1]}), which would mix with those of this start; choose another --checkpoint_dir, or move the later ones away"
        )


def _refuse_other_results(start: StartSettings, results_dir: Path, earlier: EarlierFiles, identity: RunIdentity) -> None:
    if earlier.has_metrics and earlier.results_run is not None and earlier.results_run.run_id != identity.run_id:
        raise ValueError(
            f"--checkpoint_dir {start.checkpoint_dir} holds run {identity.run_id}, and --results_dir {results_dir} holds run "
            f"{earlier.results_run.run_id}; name the two folders of one run, or an empty --results_dir"
        )


def _refusal(what: str, detail: str, continuing: bool = True) -> str:
    ways = "give --auto_resume True to continue that run, " if continuing else "choose "
    return (
        f"{what} of an earlier run ({detail}); {ways}another --results_dir and --checkpoint_dir for a new run, or give --overwrite_run "
        "True to move the files of the earlier run aside"
    )
