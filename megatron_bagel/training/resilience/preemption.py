"""How long a run takes from a signal to its end, against the time a scheduler gives it: said before the signal comes, and when it has."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.training.resilience.events import EventFile

#: A warning is given again when the time has grown by this factor.
_AGAIN = 1.1


@dataclass
class Grace:
    """``seconds`` between a signal and the end that the scheduler enforces; None: it is not known, and nothing is warned of.

    A signal can come just after the exchange that would have passed it on, so the step under way and one more are done before the save.
    """

    seconds: float | None
    events: EventFile
    longest_step: float = 0.0
    last_save: float | None = None
    _warned: float = 0.0
    _first: bool = True

    def step_took(self, steps: int, seconds: float, last_save: float | None) -> None:
        """After every step, ``steps`` of them done. ``last_save``: seconds until the newest checkpoint was whole; None before the first."""
        # The first step of a start allocates and compiles; none after it is like that.
        if not self._first:
            self.longest_step = max(self.longest_step, seconds)
        self._first = False
        self.last_save = last_save
        needed = 2 * self.longest_step + (last_save or 0.0)
        if self.seconds is None or needed <= self.seconds or needed <= _AGAIN * self._warned:
            return
        self._warned = needed
        self.events.write(
            steps, "grace",
            f"a save at a signal would be cut off: two steps of up to {self.longest_step:.1f} s and a save of {last_save or 0.0:.1f} s "
            f"take {needed:.1f} s, and --preemption_grace_seconds is {self.seconds:g}. Have the scheduler signal earlier, or save faster",
            {"needed_s": needed, "step_s": self.longest_step, "save_s": last_save},
        )  # fmt: skip

    def outlook(self) -> str:
        """At the signal, before the save: how long it should take."""
        given = f"; the scheduler gives {self.seconds:g} s from the signal on" if self.seconds is not None else ""
        if self.last_save is None:
            return f"how long that takes is not known, for nothing was saved since the start{given}"
        return f"that should take {self.last_save:.1f} s, as the last one did{given}"
