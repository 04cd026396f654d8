# SPDX-License-Identifier: Apache-2.0
"""``events.jsonl``: the events of a run besides its steps, one JSON object each. No event is ever removed, not even on resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_bagel.training.observability.metrics import jsonable

EVENTS = "events.jsonl"
logger = logging.getLogger(__name__)


class EventFile:
    """Writes events to the file and to the log, on rank 0 only. Other ranks may call it too."""

    def __init__(self, results_dir: str | Path) -> None:
        self._path = Path(results_dir) / EVENTS

    def write(self, step: int, kind: str, text: str, values: Mapping[str, Any] | None = None) -> None:
        """Write an event.

        Args:
            step: The number of the step.
            kind: A word to search for, such as bad_step, stop or straggler.
            text: A sentence for a reader.
            values: The numbers of the event.
        """
        if dist.get_rank():
            return
        logger.warning("step %d: %s", step, text)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        record = {"step": step, "event": kind, "text": text, **jsonable(values or {})}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
