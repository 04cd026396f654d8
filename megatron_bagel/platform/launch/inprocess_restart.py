"""Restarts inside the processes of a run, by nvidia-resiliency-ext: after an error that left all ranks alive nothing is started anew.

Its wrapper needs every rank to come out of what it waits in, and aborts NCCL's groups for that. Gloo's abort does nothing (torch 2.13), so
over gloo only an error that all ranks meet is restarted here; after one of a single rank the watchdog ends those that wait for it, and
the launcher starts all again, as it does for a rank that is lost.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_bagel.platform.launch.process_group import free_port
from megatron_bagel.platform.launch.rendezvous import agree_on_generation

#: Exit code of errors that another attempt may not meet (training/resilience/error_report.py).
_MAY_PASS = 1
#: Seconds between the first rank that has left its attempt and the abort of those that have not.
_PATIENCE = 5.0


def restart_in_process(attempt: Callable[[dist.Store], None], restarts: int, timeout_minutes: float) -> None:
    """Call ``attempt(store)`` on all ranks, and again up to ``restarts`` times when it ended everywhere with SystemExit(1).

    The store is another one for every attempt. ``timeout_minutes``: the most that ranks wait for each other at either end of one.
    Raises SystemExit of the last attempt, ValueError without a launcher.
    """
    from nvidia_resiliency_ext import inprocess

    if "RANK" not in os.environ:
        raise ValueError("--inprocess_restarts needs ranks that a launcher has started: use torchrun, or drop the flag")
    timeout, minute = timedelta(minutes=timeout_minutes), timedelta(minutes=1)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(agree_on_generation(store, rank, world_size, timeout), store)
    if rank == 0:
        store.set("port", str(free_port()))

    def once(call: Any = None) -> None:
        if not _ended_well(lambda: attempt(dist.PrefixStore(f"attempt-{call.iteration}", store)), call.iteration < restarts):
            # The model and its groups, before others are made.
            gc.collect()
            raise _AttemptFailed(f"attempt {call.iteration} ended with an error")
        if rank == 0 and call.iteration:
            print(f"megatron_bagel.train: done after {call.iteration} restarts in the same processes", file=sys.stderr)

    # The wrapper finds the parameter to fill by this annotation, an object and no string.
    once.__annotations__["call"] = inprocess.CallWrapper
    inprocess.Wrapper(
        store_kwargs={"port": int(store.get("port")), "timeout": timeout},
        initialize=inprocess.initialize.RetryController(max_iterations=restarts + 1, min_world_size=world_size),
        abort=inprocess.abort.AbortTorchDistributed(),
        # Hangs are the watchdog's, which names the rank.
        soft_timeout=timeout,
        hard_timeout=timeout + minute,
        barrier_timeout=timeout + 2 * minute,
        completion_timeout=timeout + 2 * minute,
        last_call_wait=timedelta(seconds=_PATIENCE),
    )(once)()


def _ended_well(attempt: Callable[[], None], again: bool) -> bool:
    """False after an error that another attempt may not meet, if there is one. No exception is left to hold the attempt's frames."""
    try:
        attempt()
    except SystemExit as end:
        if end.code != _MAY_PASS or not again:
            raise
        return False
    return True


class _AttemptFailed(Exception):
    """What the wrapper takes for a reason to start again."""
