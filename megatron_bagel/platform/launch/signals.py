"""SIGTERM and SIGUSR1 ask a run to save and leave. The signal only leaves a note; when to stop is agreed by all ranks together.

See training/resilience/stop_agreement.py.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """The signal that this process has got, if any. More of them change nothing: schedulers send them in twos and threes."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number

    @property
    def name(self) -> str:
        """Such as SIGTERM; empty when there was none."""
        return signal.Signals(self.number).name if self.number else ""


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block the signals are noted in place of ending the process. Only the main thread can have handlers; others get none."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_the_ranks(worker: int = 0) -> None:
    """For processes that read data: a signal sent to the whole job must not end them under a rank that still saves."""
    del worker  # DataLoader passes its number
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
