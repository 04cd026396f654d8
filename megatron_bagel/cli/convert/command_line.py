# SPDX-License-Identifier: Apache-2.0
"""The shared parts of the conversion commands: choices of weights, sizes, readable errors and the exit status."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_bagel import platform
from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.cli.usage import report_error
from megatron_bagel.common.console_log import log_to_console
from megatron_bagel.common.json_files import read_json_as
from megatron_bagel.config.architecture import AutoencoderArch

WEIGHTS = {"ema": ("ema",), "model": ("model",), "both": ("ema", "model")}
SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def run(prog: str, work: Callable[[], int | None]) -> int:
    """Call ``work`` and return the exit status: what it returns, 0 for None, or 2 after bad input, which is printed as one sentence."""
    log_to_console()
    platform.install_for_streaming()
    try:
        return work() or 0
    except (ValueError, OSError) as error:
        report_error(prog, error)
        return 2


def step_folder(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint, else the newest complete one inside it. Raises ValueError if there is none."""
    folder = path if step_folders.is_complete(path) else step_folders.latest_checkpoint(path) or path
    step_folders.read_state(folder)
    return folder


def autoencoder_config(path: Path | None) -> AutoencoderArch | None:
    """Return the shape in the JSON file of ``--autoencoder-config``, or None without a file."""
    if path is None:
        return None
    return read_json_as(AutoencoderArch.from_dict, path, "--autoencoder-config")


def size(text: str) -> int:
    """Return the number of bytes in "5GB", "200MB" or a plain number. This is an argparse type."""
    for unit, factor in SIZE_UNITS.items():
        if text.upper().endswith(unit):
            return int(float(text[: -len(unit)]) * factor)
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB, 200MB or a number of bytes") from None
