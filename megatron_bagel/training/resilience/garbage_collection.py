"""Python's garbage collection at chosen steps, on all ranks in the same ones (Megatron's ``--manual_gc``).

By itself each rank's collector runs whenever enough objects were made there. All ranks then wait for one after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_bagel.training.hooks import Pause, StepHook
from megatron_bagel.training.step_result import StepDone


class GarbageCollection(StepHook):
    """Collects at the start, after every ``interval``-th step (0: none), and around evaluations, as Megatron does; else never."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._was_enabled = False

    def start(self) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

    def after_step(self, done: StepDone) -> None:
        if self._interval and done.counters.steps % self._interval == 0:
            gc.collect()

    @contextmanager
    def pause(self, pause: Pause) -> Iterator[None]:
        evaluates = pause is Pause.EVALUATION
        if evaluates:
            gc.collect()
        yield
        if evaluates:
            # What the evaluation made is young; the rest was looked through just before.
            gc.collect(generation=0)

    def close(self) -> None:
        if self._was_enabled:
            gc.enable()
