"""``events.jsonl``: what happened to a run besides its steps, one JSON object each. Nothing is ever removed from it, also on resume."""

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
    """Writes on rank 0, and into the log there; other ranks may call it too."""

    def __init__(self, results_dir: str | Path) -> None:
        self._path = Path(results_dir) / EVENTS

    def write(self, step: int, kind: str, text: str, values: Mapping[str, Any] | None = None) -> None:
        """``kind`` is a word to look for (bad_step, stop, straggler), ``text`` a sentence for people, ``values`` the numbers."""
        if dist.get_rank():
            return
        logger.warning("step %d: %s", step, text)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        record = {"step": step, "event": kind, "text": text, **jsonable(values or {})}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
