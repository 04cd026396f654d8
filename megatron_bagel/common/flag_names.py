# SPDX-License-Identifier: Apache-2.0
"""Flags that nobody takes: an error names those that resemble them, in every command."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def unknown_flag(text: str, options: Iterable[str], other_names: Mapping[str, str] | None = None) -> str:
    """Return a sentence that says that no flag takes ``text``, with the options that resemble it.

    Args:
        text: The word of the command line.
        options: The flags that there are; of several spellings of one the first is shown.
        other_names: Names that other programs give to settings, in spellings that do not resemble these.
    """
    if not text.startswith("--"):
        return f"{text!r} belongs to no flag"
    name = _plain(text.split("=", 1)[0])
    spellings: dict[str, str] = {}
    for option in options:
        spellings.setdefault(_plain(option), "--" + option.lstrip("-"))
    other = (other_names or {}).get(name)
    matches = [other] if other in spellings else difflib.get_close_matches(name, spellings, n=3, cutoff=0.6)
    shown = text.split("=", 1)[0] if other_names is None else f"--{name}"
    return f"there is no flag {shown}" + (f"; did you mean {', '.join(spellings[m] for m in matches if m)}?" if matches else "; see --help")


def _plain(option: str) -> str:
    return option.replace("-", "_").lstrip("_")


class CommandParser(argparse.ArgumentParser):
    """A parser whose error for an unknown flag names those that resemble it."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line as argparse does; an unknown word ends the program with status 2 and a sentence."""
        values, unknown_words = self.parse_known_args(args, namespace)
        if unknown_words:
            self.error(unknown_flag(unknown_words[0], _options(self)))
        return values


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """Return the flags of a parser and of the modes below it."""
    options = list(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for mode in action.choices.values():
                options += _options(mode)
    return options
