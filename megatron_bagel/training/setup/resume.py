"""Where a run goes on: its newest state, in checkpoint_dir or as local checkpoints on the disks of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bagel.assembly.starting_weights import StartSettings, WeightSource
from megatron_bagel.checkpoint.dist.local_files import LocalCheckpointSettings
from megatron_bagel.checkpoint.dist.state import Trained, load_checkpoint
from megatron_bagel.checkpoint.dist.step_folders import step_of

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints


@dataclass(frozen=True)
class Continued:
    """``steps`` done before; ``state`` is everything that is no tensor, None at a run's beginning. ``told``: a sentence for the log."""

    steps: int
    state: dict[str, Any] | None
    told: str


def local_checkpoints(settings: LocalCheckpointSettings | None, checkpoint_dir: Path) -> LocalCheckpoints | None:
    """Those of a run whose other checkpoints are in ``checkpoint_dir``, if it has any. Collective.

    Raises ValueError where a node has no such folder and it cannot be made.
    """
    if settings is None:
        return None
    # Imported only here: the package it stands on is optional.
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints

    return LocalCheckpoints(settings.directory, str(checkpoint_dir), settings.every)


def continue_from(settings: StartSettings, source: WeightSource, trained: Trained, local: LocalCheckpoints | None) -> Continued:
    """Fill weights, optimizer and average from ``source``'s checkpoint, or from local ones that are newer. Collective.

    Local checkpoints of steps that this run is still to make are removed.
    """
    continued = Continued(0, None, source.describe(settings.initial))
    base = step_of(source.checkpoint) if source.checkpoint is not None else 0
    found = local.newest(base, trained) if local is not None and settings.auto_resume else None
    if local is not None and found is not None:
        local.load(trained)
        continued = Continued(found.step, found.state, f"continuing from the local checkpoints of step {found.step}, {local.description}")
    elif source.checkpoint is not None:
        continued = Continued(*load_checkpoint(source.checkpoint, trained, settings.initial.check_weights), continued.told)
    if local is not None:
        local.forget_after(continued.steps)
    return continued
