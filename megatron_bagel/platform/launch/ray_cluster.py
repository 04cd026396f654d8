# SPDX-License-Identifier: Apache-2.0
"""Work of many independent parts on a Ray cluster, or on a Ray that is started on this machine for as long as the work takes.

A part is written whole or not at all, and every start of it writes into a folder of its own. So Ray may start the part of a lost worker
again although the lost one, behind a broken network, still runs.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from types import ModuleType

MAX_RETRIES = 32  # of a part whose worker was lost
_WAIT = 1.0  # seconds
_OBJECT_STORE_BYTES = 100 << 20  # of a Ray that is started here: parts travel by files, not as objects
_ATTEMPTS = "attempts"
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class RayCluster:
    """Where parts run.

    Attributes:
        address: The cluster, such as ``ray://head:10001``; None starts Ray on this machine.
        workers: Processes of a Ray that is started here; 0 for one per core.
    """

    address: str | None = None
    workers: int = 0


@contextmanager
def connected(cluster: RayCluster) -> Iterator[ModuleType]:
    """Connect to a cluster, or start one here that ends with the block. Yields the module ``ray``.

    Raises ValueError if Ray is not installed or the cluster cannot be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs Ray, which is not installed (pip install 'megatron-bagel[ray]')") from error
    # Without "local", Ray would join a cluster that runs on this machine.
    here: dict[str, Any] = {"address": "local", "num_cpus": cluster.workers or None, "include_dashboard": False,
                            "object_store_memory": _OBJECT_STORE_BYTES}  # fmt: skip
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a Ray that is started here sends no reports
    try:
        ray.init(**({"address": cluster.address} if cluster.address else here), log_to_driver=False)
    except Exception as error:  # Ray raises this very class if its processes start too slowly
        place = f"--ray_address {cluster.address} cannot be reached" if cluster.address else "Ray cannot be started on this machine"
        raise ValueError(f"{place} ({_summary(error)})") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def finished_parts(ray: ModuleType, parts: Sequence[_Part], workers: Sequence[Callable[[_Part], Any]], label: str) -> Iterator[_Part]:
    """Start parts and yield each one that is done, in the order of their ends.

    Args:
        ray: The connected module.
        parts: What is to be done.
        workers: Functions that start a part and return its reference. Each has one part at a time.
        label: What a part is, for errors.

    Raises:
        ValueError: A part failed by an error of its own, or lost its worker more than ``MAX_RETRIES`` times.
    """
    waiting = list(reversed(parts))
    running: dict[Any, tuple[_Part, Callable[[_Part], Any]]] = {}
    for start in workers[: len(parts)]:
        part = waiting.pop()
        running[start(part)] = (part, start)
    while running:
        done, _ = ray.wait(list(running), timeout=_WAIT)
        for reference in done:
            part, start = running.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                raise ValueError(f"{label} {part} failed in Ray: {_summary(getattr(error, 'cause', None) or error)}") from error
            if waiting:
                following = waiting.pop()
                running[start(following)] = (following, start)
            yield part


def _summary(error: BaseException) -> str:
    """Return the last line of a message: Ray puts tracebacks of other processes before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)


@contextmanager
def attempt(folder: Path) -> Iterator[Path]:
    """Yield a new folder below ``folder``, whose files move to the same places in ``folder`` at the end; ``.json`` files move last."""
    own = folder / _ATTEMPTS / uuid.uuid4().hex
    own.mkdir(parents=True)
    try:
        yield own
        for file in sorted(own.rglob("*"), key=lambda path: path.suffix == ".json"):
            if file.is_file():
                target = folder / file.relative_to(own)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def remove_attempts(folder: Path) -> None:
    """Remove what killed workers left below ``folder``."""
    shutil.rmtree(folder / _ATTEMPTS, ignore_errors=True)
