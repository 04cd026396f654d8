# SPDX-License-Identifier: Apache-2.0
"""Paths as people write them: ``~`` and ``$VAR`` mean what they mean in a shell, also where no shell has replaced them."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expanded_path(text: str, setting: str) -> str:
    """Return ``text`` with its home folder and its environment variables replaced.

    Args:
        text: A path or a URL.
        setting: The flag or key that holds it, for errors.

    Raises:
        ValueError: If the environment has no such variable, or this machine no such user.
    """
    for plain, braced in _VARIABLE.findall(text):
        if (plain or braced) not in os.environ:
            raise ValueError(f"{setting} {text}: the environment has no variable {plain or braced}; set it, or write the path out")
    expanded = os.path.expanduser(os.path.expandvars(text))
    if expanded.startswith("~"):
        raise ValueError(f"{setting} {text}: there is no home folder {expanded.split('/', 1)[0]}; write the path out, or begin it with ./")
    return expanded


def location_flag(text: str) -> str:
    """Return the path or URL that a word of a command line means. This is the argparse type of flags that take either."""
    try:
        return expanded_path(text, "path")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def path_flag(text: str) -> Path:
    """Return the path that a word of a command line means. This is the argparse type of every flag that takes a file or a folder."""
    return Path(location_flag(text))


def absolute_path(text: str) -> str:
    """Return the path from the root; a URL and an absolute path stay as they are. Links are kept, because they may be moved on purpose."""
    return text if "://" in text else os.path.abspath(text)
