# SPDX-License-Identifier: Apache-2.0
"""Continues a run from its newest state, which is in checkpoint_dir or in local checkpoints on the disks of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_bagel.assembly.starting_weights import StartSettings, WeightSource
from megatron_bagel.checkpoint.dist.load import load_checkpoint
from megatron_bagel.checkpoint.dist.local_files import LocalCheckpointSettings
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.checkpoint.dist.step_folders import step_of

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints


@dataclass(frozen=True)
class Continued:
    """The point that a run continues from.

    Attributes:
        steps: The number of steps already done.
        state: Everything that is not a tensor; None at the beginning of a run.
        message: A sentence for the log.
    """

    steps: int
    state: dict[str, Any] | None
    message: str


def local_checkpoints(settings: LocalCheckpointSettings | None, checkpoint_dir: Path) -> LocalCheckpoints | None:
    """Return the local checkpoints of the run with checkpoints in ``checkpoint_dir``, or None without settings. Collective.

    Raises:
        ValueError: A node does not have the folder and cannot make it.
    """
    if settings is None:
        return None
    # Imported here because the package it needs is optional.
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints

    return LocalCheckpoints(settings.directory, str(checkpoint_dir), settings.every)


def continue_from(settings: StartSettings, source: WeightSource, trained: Trained, local: LocalCheckpoints | None) -> Continued:
    """Fill weights, optimizer and average from the checkpoint of ``source``, or from newer local checkpoints. Collective.

    Local checkpoints of later steps, which this run will do again, are removed.
    """
    continued = Continued(0, None, source.describe(settings.initial))
    base = step_of(source.checkpoint) if source.checkpoint is not None else 0
    newest = local.newest(base, trained) if local is not None and settings.auto_resume else None
    if local is not None and newest is not None:
        local.load(trained)
        continued = Continued(
            newest.step, newest.state, f"continuing from the local checkpoints of step {newest.step}, {local.description}"
        )
    elif source.checkpoint is not None:
        continued = Continued(*load_checkpoint(source.checkpoint, trained, settings.initial.check_weights), continued.message)
    if local is not None:
        local.forget_after(continued.steps)
    return continued
