# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and SIGUSR1 ask a run to save and stop. The handler only records the signal; all ranks agree together when to stop.

``training/resilience/stop_agreement.py`` makes that agreement.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """The first signal that this process has received, if any. Schedulers send two or three; the later ones change nothing."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    @property
    def name(self) -> str:
        """Return the name of the signal, such as SIGTERM, or an empty string without one."""
        return signal.Signals(self.number).name if self.number else ""


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record the signals within the block instead of ending the process. Only the main thread can have handlers."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous_handlers = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)


def leave_signals_to_the_ranks(worker: int = 0) -> None:
    """Ignore the signals in a process that reads data: a signal to the entire job must not end it while its rank still saves."""
    del worker  # DataLoader passes its number
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
