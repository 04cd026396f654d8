# SPDX-License-Identifier: Apache-2.0
"""Models on a hub as folders of this machine: one rank of each node downloads, and the others wait for as long as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_bagel.checkpoint.hf.hub import HubRequest, commit_of, download
from megatron_bagel.common.hub_names import HubName
from megatron_bagel.platform.launch.per_node import on_one_rank_per_node


@dataclass(frozen=True)
class HubFolder:
    """A downloaded model: its ``name`` with the commit as revision, and its folder in the cache."""

    name: HubName
    path: Path


def hub_folders(requests: Sequence[HubRequest]) -> list[HubFolder]:
    """Return the folder of every request, in order. All ranks call this once, and all get the same commits.

    Raises:
        ValueError: On all ranks, if a model does not exist, lacks needed files, or cannot be downloaded.
    """
    commits, paths = on_one_rank_per_node(
        lambda: [commit_of(request) for request in requests],
        lambda commits: [str(download(request, commit)) for request, commit in zip(requests, commits, strict=True)],
        "models from the hub",
    )
    names = (HubName(request.name.repository, commit) for request, commit in zip(requests, commits, strict=True))
    return [HubFolder(name, Path(path)) for name, path in zip(names, paths, strict=True)]
