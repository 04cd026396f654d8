# SPDX-License-Identifier: Apache-2.0
"""Lets a run that its launcher restarts after a failure continue from its own newest checkpoint, also without ``--auto_resume``."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from megatron_bagel.assembly.starting_weights import StartSettings
from megatron_bagel.parallel.rank_zero import on_first_rank
from megatron_bagel.platform.launch.process_group import launched_restarts

#: File in results_dir that a first start leaves if its folders were refused. A restart must not take them for its own.
MARKER = "refused_start.txt"


def restart_note() -> str:
    """Return the sentence for the log of a run that the launcher started again."""
    return f"started again by the launcher (restart {launched_restarts()}): continuing from the newest checkpoint"


def resume_after_restart(settings: StartSettings, results_dir: Path) -> StartSettings:
    """Return the settings with ``auto_resume`` on if torchrun or ft_launcher restarted this process, else unchanged. Collective.

    Raises:
        ValueError: The first start was refused its folders.
    """
    if settings.auto_resume or not _under_launcher() or not launched_restarts():
        return settings
    marker = results_dir / MARKER
    refusal = on_first_rank(lambda: marker.read_text(encoding="utf-8") if marker.is_file() else "", f"cannot read {marker}")
    if refusal:
        raise ValueError(f"the launcher started this run again, but its first start was refused: {refusal}")
    # What the first start has moved aside or written is not to be moved by its restarts.
    return replace(settings, auto_resume=True, overwrite=False)


def note_refusal(results_dir: Path, text: str) -> None:
    """Remember for restarts that the launcher's first start was refused. One rank calls it."""
    if _under_launcher() and not launched_restarts():
        results_dir.mkdir(parents=True, exist_ok=True)
        (results_dir / MARKER).write_text(text, encoding="utf-8")


def forget_refusal(results_dir: Path) -> None:
    """Forget the refusal of an earlier start, because this one has its folders. One rank calls it."""
    (results_dir / MARKER).unlink(missing_ok=True)


def _under_launcher() -> bool:
    return "TORCHELASTIC_RESTART_COUNT" in os.environ
