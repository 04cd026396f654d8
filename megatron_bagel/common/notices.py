# SPDX-License-Identifier: Apache-2.0
"""Lines that a process says once: notices about files that are read before a run has its log, and what a start has loaded."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)
_given: set[str] = set()


def notice(text: str) -> None:
    """Log ``text`` as a warning, so that it is also seen before the log is set up. Other ranks, which read the same files, stay silent."""
    if text in _given or os.environ.get("RANK", "0") != "0":
        return
    _given.add(text)
    logger.warning(text)


def say_once(log: logging.Logger, text: str) -> None:
    """Log ``text`` as information, unless this process has said it: a start fills the model for its weights and again for their average."""
    if text not in _given:
        _given.add(text)
        log.info(text)
