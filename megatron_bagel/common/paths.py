# SPDX-License-Identifier: Apache-2.0
"""Paths as people write them: ``~`` and ``$VAR`` mean what they mean in a shell, also where no shell has replaced them."""

from __future__ import annotations

import os
import re

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


def absolute_path(text: str) -> str:
    """Return the path from the root; a URL and an absolute path stay as they are. Links are kept, because they may be moved on purpose."""
    return text if "://" in text else os.path.abspath(text)
