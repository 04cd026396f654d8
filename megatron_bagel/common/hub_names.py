# SPDX-License-Identifier: Apache-2.0
"""Names of models on a hub, ``owner/name[@revision]``, and how they are told from paths.

A path that exists is a path. Without a revision, so is a name whose first part is a folder here: ``results/checkpoints`` with a typo must
not fetch the model of a stranger. A revision says that the hub is meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FORM = re.compile(r"([A-Za-z0-9][\w.-]{0,95})/([A-Za-z0-9][\w.-]{0,95})(?:@([^\s@]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """A model on the hub: ``repository`` is ``owner/name``, ``revision`` a branch, a tag, a commit, or None for the default branch."""

    repository: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def parse_hub_name(text: str) -> HubName | None:
    """Return the name that ``text`` spells, or None if it has another form. Files are not looked at."""
    match = _FORM.fullmatch(text)
    if match is None or match[2].endswith((".safetensors", ".model", ".json")):
        return None  # a file beside others
    return HubName(f"{match[1]}/{match[2]}", match[3])


def hub_name(text: str) -> HubName | None:
    """Return the model on the hub that ``text`` means, or None if it means a path."""
    name = parse_hub_name(text)
    if name is None or Path(text).exists():
        return None
    return None if name.revision is None and Path(text.split("/")[0]).is_dir() else name


def pinned_hub_name(text: str) -> HubName | None:
    """Return the name that ``text`` spells if its revision is a commit, as records of runs keep it; else None."""
    name = parse_hub_name(text)
    return name if name is not None and name.revision is not None and _COMMIT.fullmatch(name.revision) else None


def hub_hint(text: str) -> str:
    """Return the end of an error about a folder that does not exist: how to write the name if the hub is meant, or nothing."""
    name = parse_hub_name(text)
    if name is None or Path(text).exists():
        return ""
    return f". If the model {name.repository} on the hub is meant, write {name.repository}@{name.revision or 'main'}"
