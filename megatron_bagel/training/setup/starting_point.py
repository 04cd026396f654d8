# SPDX-License-Identifier: Apache-2.0
"""Chooses the checkpoint or folder that a run starts from, once for all ranks and after its files have been verified."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.assembly.starting_weights import StartSettings, WeightSource, weight_source
from megatron_bagel.checkpoint.dist.checksums import damaged, read_checksums
from megatron_bagel.checkpoint.dist.step_folders import is_complete
from megatron_bagel.parallel.rank_zero import from_all_ranks, on_first_rank

logger = logging.getLogger(__name__)


def starting_point(settings: StartSettings) -> WeightSource:
    """Return where this run starts. All ranks take rank 0's choice, because folders may change while ranks look at them. Collective.

    With ``verify`` all ranks together compare the checksums of a checkpoint first. If the newest checkpoint, which ``auto_resume``
    chose, is damaged, the run starts from the step before it and logs a warning.

    Raises:
        ValueError: A checkpoint that was named is damaged, or every checkpoint of the run is. A run never starts from scratch because
            its checkpoints are lost.
    """
    unusable: list[Path] = []
    while True:
        source = on_first_rank(lambda: weight_source(settings, unusable), "cannot choose where to start")
        folder = source.checkpoint or (source.folder if source.folder is not None and is_complete(source.folder) else None)
        if folder is None or not settings.verify:
            return source
        problems = verify_together(folder)
        if not problems:
            return source
        if folder.parent != settings.checkpoint_dir or not settings.auto_resume:
            raise ValueError(f"{folder} is damaged: {'; '.join(problems[:5])}. Start from another step, or copy the checkpoint again")
        if dist.get_rank() == 0:
            logger.warning("%s is damaged (%s): the step before it is used", folder, "; ".join(problems[:5]))
        unusable.append(folder)


def verify_together(folder: Path) -> list[str]:
    """Read all files of a checkpoint, each rank its share, and return their problems, the same on all ranks. Collective."""
    if dist.get_rank() == 0 and read_checksums(folder) is None:
        logger.warning("%s has no checksums, because an earlier version wrote it: its files are used without a check", folder)
    return from_all_ranks(damaged(folder, dist.get_rank(), dist.get_world_size()))
