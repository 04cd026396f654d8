# SPDX-License-Identifier: Apache-2.0
"""Datasets on the Hugging Face hub by name: the files of a build are downloaded into the hub's cache on this machine.

The names of the files hold the commit. So an index of another commit is an index of other sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from megatron_bagel.common.hub_names import parse_hub_name

HUB_KEYS = ("hub", "hub_files")
#: Where ``datasets`` puts the training split of a dataset with one configuration.
DEFAULT_FILES = "data/train-*.parquet"
_ENDINGS = (".parquet", ".tar")


def check_hub_keys(hub: Mapping[str, Any], others: Mapping[str, Any], has_pictures: bool, label: str) -> None:
    """Raise ValueError with ``label`` if the keys ``hub`` and ``hub_files`` of a dataset do not fit each other or its other keys."""
    name = hub.get("hub")
    if name is None:
        raise ValueError(f"{label}: hub_files belongs to a dataset on the hub; name it with hub, or remove the key")
    if parse_hub_name(name) is None:
        raise ValueError(f"{label}: hub must be owner/name or owner/name@revision, got {name!r}")
    if others:
        raise ValueError(f"{label}: it is on the hub, so {', '.join(sorted(others))} must go (or the key hub)")
    if not has_pictures:
        raise ValueError(f"{label}: datasets of the group text are jsonl files; download {name} and give its jsonl_path")


@lru_cache(maxsize=64)
def download_files(hub: str, pattern: str | None, label: str) -> tuple[str, ...]:
    """Download the files of a dataset that ``pattern`` selects, if they are not in the cache, and return their paths here, sorted.

    Args:
        hub: The dataset, ``owner/name`` or ``owner/name@revision``.
        pattern: Names of files, as in ``config/train-*.parquet``; None for the training split.
        label: The dataset's name in the configuration, for errors.

    Raises:
        ValueError: There is no such dataset or file, or it cannot be downloaded.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    name, pattern = parse_hub_name(hub), pattern or DEFAULT_FILES
    assert name is not None, "check_hub_keys has parsed it"
    try:
        folder = Path(
            huggingface_hub.snapshot_download(name.repository, repo_type="dataset", revision=name.revision, allow_patterns=[pattern])
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"{label}: the dataset {hub} cannot be downloaded from the hub ({reason[0] if reason else error!r})") from error
    paths = (path for path in folder.rglob("*") if path.is_file() and fnmatch(path.relative_to(folder).as_posix(), pattern))
    files = sorted(str(path) for path in paths if path.suffix in _ENDINGS)
    if not files:
        raise ValueError(
            f"{label}: no parquet or tar file of {hub} on the hub is called {pattern}; say with hub_files which ones to read, as in "
            "hub_files: config/train-*.parquet"
        )
    if len({Path(file).suffix for file in files}) > 1:
        raise ValueError(f"{label}: {pattern} selects parquet and tar files of {hub}; narrow hub_files to one kind")
    return tuple(files)


def container_of(files: tuple[str, ...]) -> Literal["parquet", "tar"]:
    """Return the kind of downloaded files."""
    return "tar" if files[0].endswith(".tar") else "parquet"
