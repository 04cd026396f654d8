# SPDX-License-Identifier: Apache-2.0
"""Hooks of the training loop. The loop calls them before and after each step and does not know what they do.

All ranks have the same hooks in the same order, so a hook may communicate with other ranks. An error in a hook ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import Enum
from types import TracebackType

from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.training.step_result import StepDone


class Pause(Enum):
    """Work of a run that is not a training step. Reports use the value as its name."""

    EVALUATION = "an evaluation"
    SAVE = "a save"
    LOCAL_SAVE = "a local save"
    LAST_SAVE = "the last save"


class StepHook:
    """Watches the steps of a run. A subclass overrides the methods that it needs; the others do nothing."""

    def start(self) -> None:
        """Prepare for the first step. The loop calls this when it begins."""

    def before_step(self, step: int) -> None:
        """Take note that step number ``step`` begins. Its data has not been requested yet."""

    def data_loaded(self) -> None:
        """Take note that this rank has its data and has not waited for other ranks yet."""

    def packs(self, packs: Sequence[LoadedPack]) -> None:
        """Take note of the packs of this replica that the step trains on."""

    def batch_settled(self) -> None:
        """Take note that all ranks have data that they can train on. The computation begins after this call."""

    def gradients_ready(self) -> None:
        """Take note that this rank has its gradients and has not exchanged them yet. A step that is computed again calls this again."""

    def after_step(self, done: StepDone) -> None:
        """Take note of a finished step. It has not been logged, evaluated or saved yet."""

    def evaluated(self, steps: int, numbers: Mapping[str, float]) -> None:
        """Take note of the numbers of an evaluation after ``steps`` steps, the same on every rank."""

    def pause(self, pause: Pause) -> AbstractContextManager[None]:
        """Return the context that an evaluation or a save runs in."""
        del pause
        return nullcontext()

    def close(self) -> None:
        """Release what the hook uses. The loop calls this when it ends, also after an error, but only if ``start`` succeeded."""


class Hooks(StepHook):
    """Presents several hooks as one. It calls them in their order; pauses end and hooks close in the reverse order.

    As a context manager it starts and closes them. Every hook that was started is closed, even if another one fails.
    """

    def __init__(self, hooks: Sequence[StepHook] = ()) -> None:
        self._hooks = tuple(hooks)
        self._started = ExitStack()

    def __enter__(self) -> Hooks:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._started.__exit__(kind, error, trace)

    def start(self) -> None:
        with ExitStack() as started:
            for hook in self._hooks:
                hook.start()
                started.callback(hook.close)
            self._started = started.pop_all()

    def before_step(self, step: int) -> None:
        for hook in self._hooks:
            hook.before_step(step)

    def data_loaded(self) -> None:
        for hook in self._hooks:
            hook.data_loaded()

    def packs(self, packs: Sequence[LoadedPack]) -> None:
        for hook in self._hooks:
            hook.packs(packs)

    def batch_settled(self) -> None:
        for hook in self._hooks:
            hook.batch_settled()

    def gradients_ready(self) -> None:
        for hook in self._hooks:
            hook.gradients_ready()

    def after_step(self, done: StepDone) -> None:
        for hook in self._hooks:
            hook.after_step(done)

    def evaluated(self, steps: int, numbers: Mapping[str, float]) -> None:
        for hook in self._hooks:
            hook.evaluated(steps, numbers)

    @contextmanager
    def pause(self, pause: Pause) -> Iterator[None]:
        with ExitStack() as contexts:
            for hook in self._hooks:
                contexts.enter_context(hook.pause(pause))
            yield

    def close(self) -> None:
        self._started.close()
