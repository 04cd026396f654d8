# SPDX-License-Identifier: Apache-2.0
"""Compares a run with the checkpoint that it continues, before its weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bagel.checkpoint.dist.step_folders import read_state
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.training.resilience.resume_fingerprint import Differences, differences, saved_fingerprint

logger = logging.getLogger(__name__)


def check_resume(checkpoint: Path, fingerprint: Mapping[str, Any], restarted_groups: Collection[str]) -> None:
    """Refuse a run that must not continue ``checkpoint``, and say in the log what changes. Collective.

    Args:
        checkpoint: The checkpoint to continue.
        fingerprint: What identifies this run.
        restarted_groups: Groups of data that begin their order again.

    Raises:
        ValueError: A setting, the data or the tokenizer differ that must not.
    """

    def compare() -> Differences:
        return differences(saved_fingerprint(read_state(checkpoint)["run"]), fingerprint, restarted_groups)

    found = on_first_rank(compare, f"cannot continue from {checkpoint}")
    if found.refused:
        raise ValueError(
            f"cannot continue from {checkpoint}: {'; '.join(found.refused)}. Use the same, or start another run from its weights "
            "(--resume_from with --resume_model_only True, and folders of its own)"
        )
    if dist.get_rank() == 0:
        for sentence in found.said:
            logger.warning("changed on resume: %s", sentence)
