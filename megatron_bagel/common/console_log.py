# SPDX-License-Identifier: Apache-2.0
"""The log of a command that works once, such as a converter: this package's messages on the console, and only warnings of others."""

from __future__ import annotations

import logging

_PACKAGE = __name__.partition(".")[0]


def log_to_console() -> None:
    """Print log messages on stderr, unless the program that runs this has a log of its own."""
    handler = logging.StreamHandler()
    handler.addFilter(_is_shown)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def _is_shown(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == _PACKAGE
