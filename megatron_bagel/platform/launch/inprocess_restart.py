# SPDX-License-Identifier: Apache-2.0
"""Restarts inside the processes of a run, by nvidia-resiliency-ext: after an error that left all ranks alive no process starts again.

The wrapper needs every rank to leave its current wait, and aborts NCCL's process groups for that. Gloo's abort does nothing
(torch 2.13). Over gloo only an error that all ranks meet restarts here. After an error of a single rank the watchdog ends the ranks
that wait for it, and the launcher starts all ranks again, as for a lost rank.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_bagel.platform.launch.process_group import reserved_port
from megatron_bagel.platform.launch.rendezvous import generation_store

#: Exit code of errors that another attempt may not meet (``training/resilience/error_report.py``).
_RETRY_CODE = 1
#: Seconds between the first rank that leaves its attempt and the abort of the ranks that have not left.
_ABORT_DELAY = 5.0


def restart_in_process(attempt: Callable[[dist.Store], None], restarts: int, timeout_minutes: float, command: str) -> None:
    """Call ``attempt(store)`` on all ranks, and repeat it up to ``restarts`` times while it ends with SystemExit(1) everywhere.

    Args:
        attempt: Runs one attempt with a store that no other attempt uses.
        restarts: The largest number of restarts.
        timeout_minutes: The longest time that ranks wait for each other at the start or the end of an attempt.
        command: Name of the command in its messages.

    Raises:
        SystemExit: The exit of the last attempt.
        ValueError: Without a launcher.
    """
    from nvidia_resiliency_ext import inprocess

    if "RANK" not in os.environ:
        raise ValueError("--inprocess_restarts needs ranks that a launcher started; use torchrun, or drop the flag")
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = generation_store(timeout)

    def run_attempt(call: Any = None) -> None:
        if not _succeeded(lambda: attempt(dist.PrefixStore(f"attempt-{call.iteration}", store)), call.iteration < restarts):
            # Frees the model and its process groups before the next attempt creates others.
            gc.collect()
            raise _AttemptFailed(f"attempt {call.iteration} ended with an error")
        if rank == 0 and call.iteration:
            print(f"{command}: done after {call.iteration} restarts in the same processes", file=sys.stderr)

    # The wrapper finds the parameter to fill by this annotation, which must be an object instead of a string.
    run_attempt.__annotations__["call"] = inprocess.CallWrapper
    with reserved_port() if rank == 0 else nullcontext(0) as port:
        if rank == 0:
            store.set("port", str(port))
        _wrapper(int(store.get("port")), restarts, world_size, timeout)(run_attempt)()


def _wrapper(port: int, restarts: int, world_size: int, timeout: timedelta) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Return the wrapper that repeats a function on all ranks, which meet at ``port`` of the host of rank 0."""
    from nvidia_resiliency_ext import inprocess

    minute = timedelta(minutes=1)
    return inprocess.Wrapper(
        store_kwargs={"port": port, "timeout": timeout},
        initialize=inprocess.initialize.RetryController(max_iterations=restarts + 1, min_world_size=world_size),
        abort=inprocess.abort.AbortTorchDistributed(),
        # The watchdog handles hangs, because it names the rank.
        soft_timeout=timeout,
        hard_timeout=timeout + minute,
        barrier_timeout=timeout + 2 * minute,
        completion_timeout=timeout + 2 * minute,
        last_call_wait=timedelta(seconds=_ABORT_DELAY),
    )


def _succeeded(attempt: Callable[[], None], can_restart: bool) -> bool:
    """Return False after an error that another attempt may not meet. No exception keeps the frames of the attempt alive."""
    try:
        attempt()
    except SystemExit as exit_request:
        if exit_request.code != _RETRY_CODE or not can_restart:
            raise
        return False
    return True


class _AttemptFailed(Exception):
    """Tells the wrapper to start another attempt."""
