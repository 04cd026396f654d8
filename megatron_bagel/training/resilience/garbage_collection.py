# SPDX-License-Identifier: Apache-2.0
"""Runs Python's garbage collection at chosen steps, the same on all ranks (Megatron's ``--manual_gc``).

Otherwise each rank's collector runs whenever that rank has made enough objects, and all ranks wait for one after the other.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_bagel.training.hooks import Pause, StepHook
from megatron_bagel.training.step_result import StepDone


class GarbageCollection(StepHook):
    """Collects at the start, after every ``interval`` steps (0 for never), and around evaluations, as Megatron does."""

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
        is_evaluation = pause is Pause.EVALUATION
        if is_evaluation:
            gc.collect()
        yield
        if is_evaluation:
            # Objects of the evaluation are young, and all older objects were examined just before it.
            gc.collect(generation=0)

    def close(self) -> None:
        if self._was_enabled:
            gc.enable()
