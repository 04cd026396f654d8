# SPDX-License-Identifier: Apache-2.0
"""Long work that one rank of each node does before training, such as a download, while the other ranks wait without a time limit.

The ranks meet in the store of the rendezvous and not in a collective, whose time-out a download of hours would exceed.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_bagel.common.json_text import parse_json
from megatron_bagel.platform.launch.process_group import side_store

logger = logging.getLogger(__name__)

_REPORT_S = 60.0  # seconds between lines about ranks that still work
_MAX_PAUSE_S = 5.0


def on_one_rank_per_node(
    decide: Callable[[], list[str]], work: Callable[[list[str]], list[str]], purpose: str
) -> tuple[list[str], list[str]]:
    """Let rank 0 decide something, and the first rank of every node do work for its node. All ranks call this and return together.

    Args:
        decide: What is the same for all nodes. It runs on rank 0.
        work: Gets the result of ``decide``. It runs on the first rank of every node, and once without a process group.
        purpose: Names the work in the store and in log lines. Each purpose is used once per process group.

    Returns:
        The results of ``decide``, and of ``work`` on this rank's node.

    Raises:
        ValueError: On all ranks, if ``decide`` or ``work`` raises OSError or ValueError anywhere.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        decided = decide()
        return decided, work(decided)
    meeting = _Meeting(purpose)
    if dist.get_rank() == 0:
        meeting.do("decided", decide)
    decided = meeting.result("decided")
    node = f"node/{os.environ.get('GROUP_RANK', '')}/{socket.gethostname()}"
    if os.environ.get("LOCAL_RANK", "0") == "0":
        node = node if "LOCAL_RANK" in os.environ else f"{node}/{dist.get_rank()}"
        meeting.do(node, lambda: work(decided))
    results = meeting.result(node)
    meeting.wait_for_all()
    return decided, results


class _Meeting:
    """What ranks tell each other through the store: results under keys, one failure, and how many ranks have what they need."""

    def __init__(self, purpose: str) -> None:
        self._store, self._purpose = side_store(purpose), purpose

    def do(self, key: str, action: Callable[[], list[str]]) -> None:
        """Run ``action`` and give its result, or its failure, to those that wait."""
        try:
            self._store.set(key, json.dumps(action()))
        except (OSError, ValueError) as error:
            self._store.set("failure", str(error))
            raise

    def result(self, key: str) -> list[str]:
        """Wait for a result. Raises ValueError for the failure of any rank."""
        self._wait(key)
        return [str(value) for value in parse_json(self._store.get(key), key)]

    def wait_for_all(self) -> None:
        """Wait until all ranks have their results: the next collective must not wait for a node that still works."""
        if self._store.add("ready", 1) == dist.get_world_size():
            self._store.set("all", "")
        self._wait("all")

    def _wait(self, key: str) -> None:
        pause, next_report = 0.05, time.monotonic() + _REPORT_S
        while not self._store.check([key]):
            if self._store.check(["failure"]):
                raise ValueError(self._store.get("failure").decode())
            if dist.get_rank() == 0 and time.monotonic() > next_report:
                ready, next_report = self._store.add("ready", 0), time.monotonic() + _REPORT_S
                logger.warning("%s: %d of %d ranks are ready, waiting for the others", self._purpose, ready, dist.get_world_size())
            time.sleep(pause)
            pause = min(1.2 * pause, _MAX_PAUSE_S)
