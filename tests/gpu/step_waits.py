# SPDX-License-Identifier: Apache-2.0
"""Prints where the third step of a run, not logged, makes the host wait for the GPU, as torch reports it: a JSON list of places.

``python -m tests.gpu.step_waits SETTINGS.yaml``
"""

from __future__ import annotations

import json
import sys
import warnings

import torch

from megatron_bagel import platform
from megatron_bagel.config.parser import parse_config
from megatron_bagel.platform.launch.process_group import init_distributed, shutdown_distributed


def main(file: str) -> None:
    """Train three steps and watch the last."""
    config = parse_config(["--config", file])
    platform.install()
    init_distributed()
    from megatron_bagel.training.loop import advance
    from tests.runs import open_run

    run = open_run(config, platform.has_gpu())
    with run.hooks, warnings.catch_warnings(record=True) as caught:
        advance(run), advance(run)
        caught.clear()
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        advance(run)
        torch.cuda.set_sync_debug_mode("default")
    run.loader.close()
    shutdown_distributed()
    print(json.dumps([f"{warning.filename}:{warning.lineno}" for warning in caught if "synchronizing" in str(warning.message)]))


if __name__ == "__main__":
    main(sys.argv[1])
