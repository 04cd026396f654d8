# SPDX-License-Identifier: Apache-2.0
"""Moves the files of an earlier run aside, into a numbered folder beside them, so that another run can use its folders."""

from __future__ import annotations

from pathlib import Path

from megatron_bagel.checkpoint.dist.stored_run import files_of_run
from megatron_bagel.training.resilience.run_identity import RUN_FILE

#: What a run writes into results_dir. Its index stays: it depends on the data alone.
RESULTS = (
    "log.txt", "config.yaml", "metrics.jsonl", "validation.jsonl", "events.jsonl", "skipped.jsonl", "loss.png", "errors", "samples", "hf",
    "tensorboard", "traces", "wandb",
)  # fmt: skip
_ASIDE = "overwritten-"


def set_results_aside(results_dir: Path) -> str:
    """Move what a run wrote into results_dir. Returns a sentence for the log; empty if there was nothing."""
    return _move(results_dir, [results_dir / name for name in RESULTS], "results")


def set_checkpoints_aside(checkpoint_dir: Path) -> str:
    """Move the checkpoints of a run. Converted checkpoints stay: runs start from them. Returns a sentence for the log, or nothing."""
    return _move(checkpoint_dir, files_of_run(checkpoint_dir), "checkpoints")


def _move(folder: Path, paths: list[Path], what: str) -> str:
    moving = [path for path in paths if path.exists()]
    if not moving:
        return ""
    target = _next_folder(folder)
    target.mkdir()
    for path in [*moving, folder / RUN_FILE]:
        if path.exists():
            path.rename(target / path.name)
    return f"the {what} of an earlier run were moved to {target}"


def _next_folder(folder: Path) -> Path:
    numbers = [path.name.removeprefix(_ASIDE) for path in folder.glob(f"{_ASIDE}*")]
    return folder / f"{_ASIDE}{max((int(number) for number in numbers if number.isdigit()), default=0) + 1:03d}"
