"""Where a run goes on: its newest state, in checkpoint_dir or as local checkpoints on the disks of its nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_bagel.assembly.training_modules import WeightSource
from megatron_bagel.checkpoint.dist.state import Trained, load_checkpoint
from megatron_bagel.checkpoint.dist.step_folders import step_of
from megatron_bagel.config.parser import Config

if TYPE_CHECKING:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints


@dataclass(frozen=True)
class Continued:
    """``steps`` done before; ``state`` is everything that is no tensor, None at a run's beginning. ``told``: a sentence for the log."""

    steps: int
    state: dict[str, Any] | None
    told: str


def local_checkpoints(config: Config) -> LocalCheckpoints | None:
    """By the flags. Collective. Raises ValueError where a node has no such folder and it cannot be made."""
    resilience = config.resilience
    if resilience.local_checkpoint_dir is None:
        return None
    # Imported only here: the package it stands on is optional.
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints

    return LocalCheckpoints(resilience.local_checkpoint_dir, config.training.checkpoint_dir, resilience.save_local_every)


def continue_from(config: Config, source: WeightSource, trained: Trained, local: LocalCheckpoints | None) -> Continued:
    """Fill weights, optimizer and average from ``source``'s checkpoint, or from local ones that are newer. Collective.

    Local checkpoints of steps that this run is still to make are removed.
    """
    continued = Continued(0, None, source.describe(config))
    base = step_of(source.checkpoint) if source.checkpoint is not None else 0
    found = local.newest(base, trained) if local is not None and config.training.auto_resume else None
    if local is not None and found is not None:
        local.load(trained)
        continued = Continued(found.step, found.state, f"continuing from the local checkpoints of step {found.step}, {local.description}")
    elif source.checkpoint is not None:
        continued = Continued(*load_checkpoint(source.checkpoint, trained), continued.told)
    if local is not None:
        local.forget_after(continued.steps)
    return continued
