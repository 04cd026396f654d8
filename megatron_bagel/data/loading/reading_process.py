# SPDX-License-Identifier: Apache-2.0
"""The two ends of a reading process: what it sends in place of a pack, and how the training process waits for it.

Whatever goes wrong in a reading process ends the run within seconds with one sentence: an error travels as a value, a process that
cannot send ends itself, and a wait looks at the stop signals every second.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from multiprocessing.queues import Queue
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from megatron_bagel.data.loading.memory_transfer import Parcel
from megatron_bagel.platform.launch.child_processes import reading_context, starting
from megatron_bagel.platform.launch.signals import StopRequest, leave_signals_to_the_ranks

#: Seconds after which a wait for a reading process looks at the stop signals, and DataLoader at its processes.
POLL_SECONDS = 1
#: Seconds that a rank waits for data after a stop signal, where nobody said how long the scheduler waits.
STOP_PATIENCE = 20.0
_TIMED_OUT = "DataLoader timed out"  # the beginning of DataLoader's error after ``POLL_SECONDS``
_WORKER_ENDED = "DataLoader worker (pid"

_Request = TypeVar("_Request")
_Record = TypeVar("_Record")  # a dataclass instance


class ReadingError(RuntimeError):
    """A reading process failed or ended, or its data did not come in time after a stop signal."""


@dataclass(frozen=True)
class ReadFailure:
    """An error of a reading process on its way to the training process.

    Attributes:
        text: What went wrong, in one sentence.
        trace: The traceback in the reading process.
        is_user_error: Whether a setting or a file causes it (a ValueError).
    """

    text: str
    trace: str
    is_user_error: bool

    @classmethod
    def of(cls, error: Exception) -> ReadFailure:
        """Describe ``error`` for the training process."""
        is_user_error = isinstance(error, ValueError)
        text = str(error) if is_user_error else f"a process that reads data failed: {type(error).__name__}: {error}"
        return cls(text, "".join(traceback.format_exception(error)), is_user_error)

    def error(self) -> Exception:
        """Return the error to raise in the training process; its cause is the traceback of the reading process."""
        error: Exception = ValueError(self.text) if self.is_user_error else ReadingError(self.text)
        error.__cause__ = ReadingError(f"in the reading process:\n{self.trace}")
        return error


def check_semaphores(context: BaseContext | None, processes: int) -> None:
    """Make and drop the queues that DataLoader makes for its processes.

    Their semaphores lie in ``/dev/shm``. If DataLoader fails between two of them, its half-made iterator prints a traceback of its own.

    Raises:
        OSError: ``/dev/shm`` has no room for them.
    """
    context = context or get_context()
    _ = [*(context.Queue() for _ in range(processes + 1)), context.Event()]


class SendingReader(Dataset[Parcel[_Record] | ReadFailure], Generic[_Request, _Record]):
    """What DataLoader calls in a reading process: reads a record with ``read`` and packs it up, or packs up the error."""

    def __init__(self, read: Callable[[_Request], _Record]) -> None:
        self.read = read

    def __getitem__(self, request: _Request) -> Parcel[_Record] | ReadFailure:
        try:
            return Parcel.of(self.read(request))
        except Exception as error:  # any error is the training process's to raise
            return ReadFailure.of(error)


def start_processes(
    read: Callable[[_Request], _Record], requests: Iterable[_Request], num_workers: int, prefetch_factor: int
) -> Iterator[Any]:
    """Start ``num_workers`` processes that call ``read`` with the ``requests`` in turn, each ``prefetch_factor`` requests ahead.

    ``next_record`` takes the records from the returned iterator, in the order of the requests; its ``_shutdown_workers`` ends the
    processes.

    Raises:
        ValueError: The processes cannot be started.
    """
    context = reading_context()
    with starting(f"{num_workers} processes that read data", "--num_workers 0 reads in the training process"):
        check_semaphores(context, num_workers)
        return iter(
            DataLoader(
                SendingReader(read),
                batch_size=None,
                sampler=requests,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                worker_init_fn=start_reading_process,
                multiprocessing_context=context,
                timeout=POLL_SECONDS,
            )
        )


def start_reading_process(worker: int) -> None:
    """Prepare a reading process: stop signals are the ranks', and a result that cannot be sent ends the process."""
    leave_signals_to_the_ranks(worker)
    # A queue sends in a thread, which by default prints an error, drops the result, and leaves the receiver waiting.
    Queue._on_queue_feeder_error = staticmethod(_end_process)  # type: ignore[attr-defined]


def _end_process(error: Exception, result: object) -> None:
    del result
    print(f"a process that reads data cannot send a pack and ends: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def next_record(
    sent: Iterator[Parcel[_Record] | ReadFailure], stop_request: StopRequest | None = None, patience: float = STOP_PATIENCE
) -> _Record:
    """Wait for the next record of the reading processes.

    Args:
        sent: What DataLoader hands over; its time-out is ``POLL_SECONDS``.
        stop_request: The stop signals of this process.
        patience: Seconds to wait after a stop signal.

    Raises:
        ReadingError: A reading process failed or ended, or no data came in time after a stop signal.
        ValueError: The data or the settings are at fault.
    """
    stopped_at: float | None = None
    while True:
        try:
            result = next(sent)
            break
        except RuntimeError as error:
            if str(error).startswith(_WORKER_ENDED):
                raise ReadingError(_ended(str(error))) from error
            if not str(error).startswith(_TIMED_OUT):
                raise
        if stop_request is not None and stop_request.number:
            stopped_at = stopped_at or time.monotonic()
            if time.monotonic() - stopped_at > patience:
                raise ReadingError(
                    f"{stop_request.name} asks to stop, and no data came within {patience:g} s of it: the processes that read data are "
                    "slow or hang, so the step cannot be finished and nothing was saved after the last checkpoint"
                )
    if isinstance(result, ReadFailure):
        raise result.error()
    try:
        return result.open()
    except OSError as error:
        raise ReadingError(f"a pack of a reading process cannot be opened, so the process has probably ended: {error}") from error


def _ended(text: str) -> str:
    """Return DataLoader's sentence about a process that ended, with what to do."""
    return (
        f"a process that reads data has ended: {text.strip().splitlines()[0]} If it was killed, the machine may be out of memory: "
        "lower --num_workers or --prefetch_factor"
    )
