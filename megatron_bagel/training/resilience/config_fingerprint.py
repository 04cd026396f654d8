"""Whether all ranks run the same thing: one digest of settings, versions and code, compared before anything else is exchanged."""

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

_FEW = 5  # so many differences are spelled out


def code_hash(folder: Path | None = None) -> str:
    """SHA-256 over the package's Python files, names and contents: one version number stands for many states of a checkout."""
    folder = folder or Path(megatron_bagel.__file__).parent
    summed = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        summed.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return summed.hexdigest()


def fingerprint(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything of a rank that must be the same on all: settings by flag name (of ``Config.to_dict``), versions, the package's code."""
    settings = {f"--{name}": value for part in record.values() if isinstance(part, dict) for name, value in part.items()}
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    ours = {"megatron_bagel": megatron_bagel.__version__, "code of megatron_bagel": code_hash()[:12]}
    return {**settings, "flags given": record["given"], "Python": python_platform.python_version(), **versions, **ours}


def check_same_everywhere(record: Mapping[str, Any]) -> None:
    """Refuse a world whose ranks were started with different settings or code. Collective over the world, and the first thing of a run:
    groups of different sizes would wait for each other.

    Raises ValueError on all ranks, naming the ranks that differ from the others, and in what.
    """
    own = fingerprint(record)
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).digest()
    here = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(platform.device())
    all_digests = torch.empty(dist.get_world_size() * len(here), dtype=torch.int64, device=here.device)
    dist.all_gather_into_tensor(all_digests, here)
    found = [tuple(row) for row in all_digests.view(-1, len(here)).tolist()]
    if len(set(found)) == 1:
        return
    everyone: list[Any] = [None] * len(found)
    dist.all_gather_object(everyone, (socket.gethostname(), own))
    raise ValueError(_differences(found, everyone))


def _differences(digests: list[tuple[int, ...]], everyone: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Ranks that differ from the most common state (of equally common ones, that of the lowest rank), with what differs."""
    common = Counter(digests).most_common(1)[0][0]
    expected = everyone[digests.index(common)][1]
    odd: dict[tuple[int, ...], list[int]] = {}
    for rank, digest in enumerate(digests):
        if digest != common:
            odd.setdefault(digest, []).append(rank)
    parts = []
    for digest, ranks in odd.items():
        host, state = everyone[digests.index(digest)]
        keys = [key for key in {**expected, **state} if expected.get(key) != state.get(key)]
        differing = [f"{key} is {state.get(key)} there and {expected.get(key)} elsewhere" for key in keys]
        parts.append(f"{rank_list(ranks)} (on {host}): {shorten(differing, _FEW, '; ')}")
    return (
        f"not all ranks run the same: {' | '.join(parts)}. Start every rank with the same flags, and with the same version "
        "installed on every host"
    )
