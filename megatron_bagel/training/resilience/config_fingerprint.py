# SPDX-License-Identifier: Apache-2.0
"""Checks that all ranks run the same settings, versions and code, by a digest that they compare before any other communication."""

from __future__ import annotations

import hashlib
import json
import platform as python_platform
import socket
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_bagel
from megatron_bagel import platform
from megatron_bagel.common.wording import shorten
from megatron_bagel.parallel.rank_coordinates import rank_list

_MAX_SHOWN = 5  # differences that an error spells out


def code_hash(folder: Path | None = None) -> str:
    """Return the SHA-256 of the names and contents of the package's Python files. One version number covers many states of a checkout."""
    folder = folder or Path(megatron_bagel.__file__).parent
    sha256 = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        sha256.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return sha256.hexdigest()


def fingerprint(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same on all ranks: settings by flag name (from ``Config.to_dict``), versions, and the package's code."""
    settings = {f"--{name}": value for part in record.values() if isinstance(part, dict) for name, value in part.items()}
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    package = {"megatron_bagel": megatron_bagel.__version__, "code of megatron_bagel": code_hash()[:12]}
    return {**settings, "flags given": record["given"], "Python": python_platform.python_version(), **versions, **package}


def check_same_everywhere(record: Mapping[str, Any]) -> None:
    """Refuse a world whose ranks were started with different settings or code. Collective over the world.

    A run calls this first, because groups of different sizes would wait for each other.

    Raises:
        ValueError: On all ranks, naming the ranks that differ from the others and the differences.
    """
    local_state = fingerprint(record)
    digest = hashlib.sha256(json.dumps(local_state, sort_keys=True, default=str).encode()).digest()
    local_digest = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(platform.device())
    all_digests = torch.empty(dist.get_world_size() * len(local_digest), dtype=torch.int64, device=local_digest.device)
    dist.all_gather_into_tensor(all_digests, local_digest)
    digests = [tuple(row) for row in all_digests.view(-1, len(local_digest)).tolist()]
    if len(set(digests)) == 1:
        return
    states: list[Any] = [None] * len(digests)
    dist.all_gather_object(states, (socket.gethostname(), local_state))
    raise ValueError(_differences(digests, states))


def _differences(digests: list[tuple[int, ...]], states: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Name the ranks that differ from the most common state (in a tie, that of the lowest rank) and the differences."""
    common = Counter(digests).most_common(1)[0][0]
    expected = states[digests.index(common)][1]
    ranks_of: dict[tuple[int, ...], list[int]] = {}
    for rank, digest in enumerate(digests):
        if digest != common:
            ranks_of.setdefault(digest, []).append(rank)
    parts = []
    for digest, ranks in ranks_of.items():
        host, state = states[digests.index(digest)]
        keys = [key for key in {**expected, **state} if expected.get(key) != state.get(key)]
        differing = [f"{key} is {state.get(key)} there and {expected.get(key)} elsewhere" for key in keys]
        parts.append(f"{rank_list(ranks)} (on {host}): {shorten(differing, _MAX_SHOWN, '; ')}")
    return (
        f"not all ranks run the same: {' | '.join(parts)}. Start every rank with the same flags, and with the same version "
        "installed on every host"
    )
