# SPDX-License-Identifier: Apache-2.0
"""Notices about files that are read before a run has its log: one line on rank 0, once per process."""

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
