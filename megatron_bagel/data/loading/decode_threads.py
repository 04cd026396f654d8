# SPDX-License-Identifier: Apache-2.0
"""Decodes pictures in parallel inside one process: decoders and resizing release Python's lock while they work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


class DecodeThreads:
    """Runs jobs on ``threads`` threads; with fewer than two, in the calling thread.

    An instance may be pickled and forked: every process starts its threads at first use.
    """

    def __init__(self, threads: int) -> None:
        if threads < 0:
            raise ValueError(f"decode_threads must not be negative, got {threads}")
        self.threads = threads
        self._pool: tuple[int, ThreadPoolExecutor] | None = None  # with the id of its process

    def __getstate__(self) -> dict[str, object]:
        return {"threads": self.threads, "_pool": None}

    def map(self, work: Callable[[_Job], _Result], jobs: Sequence[_Job]) -> list[_Result]:
        """Return ``work(job)`` of every job, in order."""
        if self.threads < 2 or len(jobs) < 2:
            return [work(job) for job in jobs]
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = os.getpid(), ThreadPoolExecutor(self.threads, "decode")
        return list(self._pool[1].map(work, jobs))
