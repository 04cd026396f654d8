"""Which checkpoint or folder a run starts from, decided once for all ranks, and only after its files were found whole."""

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
    """Where this run starts: rank 0's choice on all ranks, for folders may change while ranks look at them. Collective.

    A checkpoint's checksums are compared first (`verify`), the work shared by all ranks. Where `auto_resume` chose a damaged
    one, the step before it is taken and the log says so. Raises ValueError when a damaged one was asked for by name, or when every
    checkpoint of the run is damaged: a run never begins anew because its checkpoints are lost.
    """
    unusable: list[Path] = []
    while True:
        source = on_first_rank(lambda: weight_source(settings, unusable), "cannot choose where to start")
        folder = source.checkpoint or (source.folder if source.folder is not None and is_complete(source.folder) else None)
        if folder is None or not settings.verify:
            return source
        wrong = verify_together(folder)
        if not wrong:
            return source
        if folder.parent != settings.checkpoint_dir or not settings.auto_resume:
            raise ValueError(f"{folder} is damaged: {'; '.join(wrong[:5])}. Use another step, or copy it again")
        if dist.get_rank() == 0:
            logger.warning("%s is damaged (%s): the step before it is used", folder, "; ".join(wrong[:5]))
        unusable.append(folder)


def verify_together(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files, all of them read, each rank its share. Collective; the same answer on all ranks."""
    if dist.get_rank() == 0 and read_checksums(folder) is None:
        logger.warning("%s has no checksums (an earlier version wrote it): its files are used unchecked", folder)
    return from_all_ranks(damaged(folder, dist.get_rank(), dist.get_world_size()))
