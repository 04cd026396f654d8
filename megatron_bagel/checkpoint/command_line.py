"""What the checkpoint commands share: which weights, sizes, readable errors and the exit status."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_bagel import platform
from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.config.architecture import AutoencoderArch

WEIGHTS = {"ema": ("ema",), "model": ("model",), "both": ("ema", "model")}
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(name: str, work: Callable[[], None]) -> int:
    """Run ``work`` and return the exit status. An error that a user can cause prints one sentence and returns 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    install_for_streaming()
    try:
        work()
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


def install_for_streaming() -> None:
    """Install the platform for work that handles many tensors once, so freed memory returns to the system at once."""
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "131072")  # the C library's default; setting it at all has the effect
    platform.install()


def step_folder(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the newest complete one inside it. Raises ValueError if there is none."""
    folder = path if step_folders.is_complete(path) else step_folders.latest_checkpoint(path) or path
    step_folders.read_state(folder)
    return folder


def autoencoder_config(path: Path | None) -> AutoencoderArch | None:
    """Read the autoencoder's architecture from the JSON file of --autoencoder-config."""
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"--autoencoder-config: there is no file {path}")
    return AutoencoderArch.from_dict(json.loads(path.read_text(encoding="utf-8")))


def size(text: str) -> int:
    """Parse "5GB", "200MB" or a number into bytes, as an argparse type."""
    for unit, factor in SIZE_UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB, 200MB or a number of bytes") from None
