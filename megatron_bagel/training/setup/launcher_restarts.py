"""Lets a run that its launcher restarts after a failure continue from its own newest checkpoint, also without ``--auto_resume``."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.assembly.starting_weights import StartSettings
from megatron_bagel.checkpoint.dist.step_folders import latest_checkpoint
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.platform.launch.process_group import launched_restarts

#: File in results_dir that a first start leaves if it finds checkpoints it was not asked to continue. A restart could not tell them from
#: its own.
MARKER = "found_checkpoints.txt"
logger = logging.getLogger(__name__)


def resume_after_restart(settings: StartSettings, results_dir: Path) -> StartSettings:
    """Return the settings with ``auto_resume`` on if torchrun or ft_launcher restarted this process, else unchanged. Collective.

    Raises:
        ValueError: Checkpoints of an earlier run were in ``checkpoint_dir`` before this run first started.
    """
    if settings.auto_resume or "TORCHELASTIC_RESTART_COUNT" not in os.environ:
        return settings
    marker = results_dir / MARKER
    if not launched_restarts():
        on_first_rank(lambda: _record_earlier_checkpoint(marker, settings.checkpoint_dir), f"cannot write {marker}")
        return settings
    earlier = on_first_rank(lambda: marker.read_text(encoding="utf-8") if marker.is_file() else "", f"cannot read {marker}")
    if earlier:
        raise ValueError(
            f"the launcher started this run again, but {earlier} existed before the run began, so its own checkpoints cannot be "
            "distinguished from an earlier run's. Pass --auto_resume True to continue from the newest, or an empty --checkpoint_dir"
        )
    if dist.get_rank() == 0:
        logger.info("started again by the launcher (restart %d): continuing from the newest checkpoint", launched_restarts())
    return replace(settings, auto_resume=True)


def _record_earlier_checkpoint(marker: Path, checkpoint_dir: Path) -> None:
    """Write the newest checkpoint in ``checkpoint_dir`` into ``marker``, or remove ``marker`` if there is none."""
    newest = latest_checkpoint(checkpoint_dir)
    if newest is None:
        marker.unlink(missing_ok=True)
        return
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(str(newest), encoding="utf-8")
