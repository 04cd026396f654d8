# SPDX-License-Identifier: Apache-2.0
"""Compares the time that a run needs after a signal with the time that the scheduler gives, before the signal and when it arrives."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.training.resilience.events import EventFile

#: The warning is repeated when the time has grown by this factor.
_REPEAT_FACTOR = 1.1


@dataclass
class Grace:
    """The time ``seconds`` between a signal and the end that the scheduler enforces; None if unknown, without any warning.

    A signal can arrive just after the ranks have exchanged stop requests, so the current step and one more are done before the save.
    """

    seconds: float | None
    events: EventFile
    longest_step: float = 0.0
    last_save: float | None = None
    _warned: float = 0.0
    _first: bool = True

    def step_took(self, steps: int, seconds: float, last_save: float | None) -> None:
        """Note the duration of a step, and warn if a save at a signal would take too long.

        Args:
            steps: The number of steps done.
            seconds: The duration of the last one.
            last_save: The seconds until the newest checkpoint was complete; None before the first.
        """
        # Only the first step of a process allocates and compiles.
        if not self._first:
            self.longest_step = max(self.longest_step, seconds)
        self._first = False
        self.last_save = last_save
        needed = 2 * self.longest_step + (last_save or 0.0)
        if self.seconds is None or needed <= self.seconds or needed <= _REPEAT_FACTOR * self._warned:
            return
        self._warned = needed
        self.events.write(
            steps, "grace",
            f"a save at a signal would not finish: two steps of up to {self.longest_step:.1f} s and a save of {last_save or 0.0:.1f} s "
            f"take {needed:.1f} s, but --preemption_grace_seconds is {self.seconds:g}. Let the scheduler signal earlier, or save faster",
            {"needed_s": needed, "step_s": self.longest_step, "save_s": last_save},
        )  # fmt: skip

    def outlook(self) -> str:
        """Return how long the save after a signal should take."""
        limit = f"; the scheduler gives {self.seconds:g} s from the signal on" if self.seconds is not None else ""
        if self.last_save is None:
            return f"the time for that is unknown, because there was no save since the start{limit}"
        return f"that should take {self.last_save:.1f} s, like the last save{limit}"
