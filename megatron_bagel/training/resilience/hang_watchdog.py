"""A thread per rank that tells the others where the rank is, and ends a run that hangs, after naming who does not answer.

Every rank puts a small beat into the store of the rendezvous every few seconds: a count, its step, and where its main thread is (read
from the thread's stack, so no code has to say so). Nobody reads them while all goes well. A rank that has made no step for too long reads
the beats of all twice: a rank whose count stands still is stopped or gone, the others say what they wait in. The first to do so
writes the report for all; then every rank ends itself, so that the launcher starts the run again.

No clock of one host is compared with another's: ages are measured where they arise, by counting the thread's own ticks.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_bagel.parallel.rank_coordinates import rank_list

#: Name of the watchdogs' store, and the key that is there once one of them has reported.
STORE, REPORTED = "watchdog", "reported"
EXIT_CODE = 18  # Megatron-Core's rerun state machine ends runs with 16 and 17
_PACKAGE = os.sep + "megatron_bagel" + os.sep
_WRAPPERS = os.sep + "platform" + os.sep


@dataclass(frozen=True)
class Limits:
    """Seconds without a step that are too many: in general, and ``slow`` ones for set-up, the first step, saves and evaluations."""

    step: float
    slow: float

    @property
    def interval(self) -> float:
        """Between beats."""
        return min(10.0, self.step / 6)


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. ``count`` rises with every beat; ``age`` is seconds since its last step; ``place`` a line of this
    package that its main thread is in, ``call`` the innermost function, such as all_reduce."""

    count: int
    step: int
    age: float
    phase: str
    place: str
    call: str
    host: str
    pid: int


class Watchdog:
    """Watches this process's main thread, and on a hang the other ranks. ``end`` is what ends the process."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, limits: Limits, results_dir: Path, end: Callable[[int], None] = os._exit
    ) -> None:
        self._store, self._rank, self._world_size, self._limits = store, rank, world_size, limits
        self._results_dir, self._end = results_dir, end
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._count, self._step, self._phase = 0, 0, "set-up and first step"
        self._seen, self._idle = (0, ""), 0.0
        self._escape: threading.Timer | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._post()
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join()

    def progress(self, step: int) -> None:
        """A step was done; ``step`` is the next one's number."""
        self._step, self._phase = step, ""

    @contextmanager
    def slow(self, phase: str) -> Iterator[None]:
        """Within the block the longer limit holds, from its beginning."""
        self._phase = phase
        yield
        self._phase = f"after {phase}"

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._limits.interval):
            now = time.monotonic()
            # A process that was stopped as a whole, or starved, has not seen its main thread idle for all that time.
            tick, before = min(now - before, 2 * self._limits.interval), now
            seen = (self._step, self._phase)
            self._seen, self._idle = seen, 0.0 if seen != self._seen else self._idle + tick
            try:
                self._post()
                if self._idle > (self._limits.slow if self._slow_phase else self._limits.step):
                    self._hang()
            except RuntimeError:  # torch's DistError: the store is gone, and with it the host that had it
                if self._idle > self._limits.step:
                    self._give_up()

    @property
    def _slow_phase(self) -> bool:
        return bool(self._phase) and not self._phase.startswith("after ")

    def _post(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat())))

    def _beat(self) -> Beat:
        place, call = stack_position(self._main)
        return Beat(self._count, self._step, self._idle, self._phase, place, call, socket.gethostname(), os.getpid())

    def _position(self) -> str:
        beat = self._beat()
        return f"rank {self._rank} has done no step for {beat.age:.0f} s: it is in {beat.call}, {beat.place}"

    def _hang(self) -> None:
        """The first rank to come here reports, and the others go when it has. Called again and again until this process has ended."""
        if self._escape is None:
            # A store that was cut off would hold this thread up for good.
            self._escape = threading.Timer(6 * self._limits.interval + 10, self._give_up)
            self._escape.daemon = True
            self._escape.start()
            if self._store.add("reporters", 1) == 1:
                text = self._compose()
                self._say(text)
                self._write(text)
                self._store.set(REPORTED, "1")
        if self._store.check([REPORTED]):
            self._escape.cancel()
            self._end(EXIT_CODE)

    def _give_up(self) -> None:
        self._say(
            f"{self._position()}. Nobody reports: the store of the rendezvous does not answer, so this host is cut off, or the one "
            "that had the store is gone"
        )
        self._end(EXIT_CODE)

    def _compose(self) -> str:
        before = self._read()
        self._closed.wait(2.5 * self._limits.interval)
        after = self._read()
        after[self._rank] = self._beat()
        silent = [rank for rank, beat in after.items() if rank != self._rank and beat.count == before[rank].count]
        return hang_report(after, silent, self._idle)

    def _read(self) -> dict[int, Beat]:
        beats = {}
        for rank in range(self._world_size):
            key = f"beat/{rank}"
            if self._store.check([key]):
                beats[rank] = Beat(**json.loads(self._store.get(key)))
            else:
                beats[rank] = Beat(0, 0, 0.0, "", "its start", "nothing yet", "unknown host", 0)
        return beats

    def _say(self, text: str) -> None:
        print(f"megatron_bagel.train: hang: {text}", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        folder = self._results_dir / "errors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"hang-step-{self._step:07d}.txt").write_text(text + "\n", encoding="utf-8")
        except OSError as error:  # the report was printed, and the run must end
            self._say(f"the report could not be written into {folder}: {error}")


def stack_position(thread: int) -> tuple[str, str]:
    """(innermost line of this package, innermost function of all) on the stack of a thread."""
    frame = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame, limit=None) if frame is not None else []
    # Loggers of torch, and the stand-ins for CUDA, wrap collectives: whom they wrap is what one wants to know.
    call = next((entry.name for entry in reversed(frames) if entry.name not in ("wrapper", "<lambda>", "__torch_function__")), "nothing")
    ours = next((entry for entry in reversed(frames) if _PACKAGE in entry.filename and _WRAPPERS not in entry.filename), None)
    if ours is None:
        return "no line of this package", call
    return f"megatron_bagel/{ours.filename.rsplit(_PACKAGE, 1)[1]}:{ours.lineno} {ours.name}", call


def hang_report(beats: dict[int, Beat], silent: Sequence[int], idle: float) -> str:
    """Who holds the run up, as far as the beats tell: ranks that are silent, else those that are elsewhere than most."""
    lines = [f"no step was done for {idle:.0f} s"]
    for rank in silent:
        beat = beats[rank]
        lines.append(
            f"rank {rank} ({beat.host}, process {beat.pid}) does not answer: it is stopped, or dead, or its host cannot be reached. "
            f"Last heard of in step {beat.step}, in {beat.call}, {beat.place}"
        )
    groups: dict[tuple[int, str, str, str], list[int]] = {}
    for rank, beat in beats.items():
        if rank not in silent:
            groups.setdefault((beat.step, beat.phase, beat.call, beat.place), []).append(rank)
    most = max(groups.values(), key=len)
    for (step, phase, call, place), ranks in sorted(groups.items(), key=lambda group: len(group[1])):
        during = f" during {phase}" if phase else ""
        suspect = not silent and len(groups) > 1 and ranks is not most
        odd = f": elsewhere than the others, on {beats[ranks[0]].host}; look here first" if suspect else ""
        verb = "is" if len(ranks) == 1 else "are"
        lines.append(f"{rank_list(ranks)} {verb} in step {step}{during}, in {call}, {place}{odd}")
    if not silent and len(groups) == 1:
        lines.append("all ranks are in the same place: the exchange itself does not end; look at the network")
    return "\n  ".join(lines)


@contextmanager
def watching(store: dist.Store, limits: Limits, results_dir: str | Path) -> Iterator[Watchdog]:
    """A watchdog of this rank while the block runs; none with a limit of 0."""
    watchdog = Watchdog(store, dist.get_rank(), dist.get_world_size(), limits, Path(results_dir), os._exit)
    if not limits.step:
        yield watchdog
        return
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()
