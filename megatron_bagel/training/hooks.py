"""Hooks of the training loop: what watches a run is called before and after each step, and the loop does not know what it is.

All ranks have the same hooks in the same order, so a hook may exchange something with the other ranks. An error of a hook ends the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import Enum
from types import TracebackType

from megatron_bagel.training.step_result import StepDone


class Pause(Enum):
    """Work of a run that is not a step. The value names it in reports."""

    EVALUATION = "an evaluation"
    SAVE = "a save"
    LOCAL_SAVE = "a local save"
    LAST_SAVE = "the last save"


class StepHook:
    """Watches the steps of a run. A hook overrides the moments that it needs; the others do nothing."""

    def start(self) -> None:
        """The loop begins."""

    def before_step(self, step: int) -> None:
        """Step number ``step`` begins; its data has not been asked for."""

    def data_loaded(self) -> None:
        """This rank has its data, and has not waited for other ranks yet."""

    def batch_settled(self) -> None:
        """All ranks have data that they can train on, and begin to compute."""

    def gradients_ready(self) -> None:
        """This rank has its gradients, and has not exchanged them yet. Called again when a step is computed again."""

    def after_step(self, done: StepDone) -> None:
        """The step is over; it has not been logged yet, nor evaluated or saved."""

    def pause(self, pause: Pause) -> AbstractContextManager[None]:
        """What surrounds an evaluation or a save."""
        del pause
        return nullcontext()

    def close(self) -> None:
        """The loop ends, by an error too. Only called after ``start``."""


class Hooks(StepHook):
    """Several hooks as one. Each moment reaches them in their order, except that pauses and the run end in the reverse order.

    As a context manager it starts and closes them: all that were started are closed, also when one of them fails.
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

    def batch_settled(self) -> None:
        for hook in self._hooks:
            hook.batch_settled()

    def gradients_ready(self) -> None:
        for hook in self._hooks:
            hook.gradients_ready()

    def after_step(self, done: StepDone) -> None:
        for hook in self._hooks:
            hook.after_step(done)

    @contextmanager
    def pause(self, pause: Pause) -> Iterator[None]:
        with ExitStack() as entered:
            for hook in self._hooks:
                entered.enter_context(hook.pause(pause))
            yield

    def close(self) -> None:
        self._started.close()
