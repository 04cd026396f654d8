# SPDX-License-Identifier: Apache-2.0
"""The name of a command in its help and its errors: the words that started it.

``prog`` is what a user types: ``megatron-bagel data build``, ``python -m megatron_bagel data build``, or ``build_index.py``.
"""

from __future__ import annotations

import argparse
import sys

from megatron_bagel.common.flag_names import CommandParser


def command_parser(description: str | None, prog: str) -> argparse.ArgumentParser:
    """Return a parser without flags. Its help keeps the line breaks of ``description`` and writes ``prog`` for each ``%(prog)s``."""
    return CommandParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def report_error(prog: str, error: Exception) -> None:
    """Print one line on stderr: the command's name and what was wrong."""
    print(f"{short_name(prog)}: {error}", file=sys.stderr)


def short_name(prog: str) -> str:
    """Return ``prog`` as a message begins with it: without ``python -m``, and without the suffix of a script."""
    return prog.removeprefix("python -m ").removesuffix(".py")
