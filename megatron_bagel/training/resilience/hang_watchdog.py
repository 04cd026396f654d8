# SPDX-License-Identifier: Apache-2.0
"""Detects a run that hangs, reports which ranks do not answer and where the others wait, and ends the run.

A thread on every rank puts a small beat into the store of the rendezvous every few seconds: a count, the rank's step, and the position of
its main thread, read from the thread's stack. No rank reads the beats while the run makes progress. A rank without progress for too long
reads the beats of all ranks twice. A rank whose count has not changed is stopped or dead; the beats of the others show where they wait.
The first rank to do so writes the report for all. Then every rank ends itself, so that the launcher restarts the run.

Clocks of different hosts are never compared. Each thread measures its own rank's age by counting its ticks.
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

from megatron_bagel.common.json_text import parse_json
from megatron_bagel.parallel.rank_coordinates import rank_list

#: Name of the watchdogs' store, and the key that exists in it once one of them has reported.
STORE, REPORTED = "watchdog", "reported"
#: Name of the command in messages of a run that was started without one.
COMMAND = "megatron_bagel.train"
EXIT_CODE = 18  # Megatron-Core's rerun state machine ends runs with 16 and 17
_PACKAGE = os.sep + "megatron_bagel" + os.sep
_WRAPPERS = os.sep + "platform" + os.sep


@dataclass(frozen=True)
class Limits:
    """The most seconds without progress: ``slow`` for set-up, the first step, saves and evaluations, and ``step`` for other steps."""

    step: float
    slow: float

    @property
    def interval(self) -> float:
        """Return the seconds between beats."""
        return min(10.0, self.step / 6)


@dataclass(frozen=True)
class Beat:
    """The state of a rank, as it reports it to the others.

    Attributes:
        count: The number of this beat.
        step: The step that the rank is in.
        age: Seconds since the rank's last step.
        phase: The evaluation or save that the rank is in, if any.
        line: The innermost line of this package on the stack of the rank's main thread.
        call: The innermost function on that stack, such as all_reduce.
        host: The host of the rank.
        pid: The process id of the rank.
    """

    count: int
    step: int
    age: float
    phase: str
    line: str
    call: str
    host: str
    pid: int


class Watchdog:
    """Watches this process's main thread and, when it hangs, the other ranks. It ends the process by ``end``."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, limits: Limits, results_dir: Path, end: Callable[[int], None] = os._exit,
        command: str = COMMAND,
    ) -> None:  # fmt: skip
        self._store, self._rank, self._world_size, self._limits = store, rank, world_size, limits
        self._results_dir, self._end, self._command = results_dir, end, command
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self._count, self._step, self._phase = 0, 0, "set-up and first step"
        self._progress, self._idle = (0, ""), 0.0
        self._escape: threading.Timer | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._post()
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join()

    def progress(self, step: int) -> None:
        """Note that a step is done. The next step has the number ``step``."""
        self._step, self._phase = step, ""

    @contextmanager
    def slow(self, phase: str) -> Iterator[None]:
        """Apply the longer limit within the block, counted from its beginning."""
        self._phase = phase
        yield
        self._phase = f"after {phase}"

    def _watch(self) -> None:
        """Post beats and detect a hang until the watchdog is closed. This is what the thread runs."""
        last_time = time.monotonic()
        while not self._closed.wait(self._limits.interval):
            now = time.monotonic()
            # A long tick means that the whole process was stopped or starved. The main thread was not idle for all of it.
            tick, last_time = min(now - last_time, 2 * self._limits.interval), now
            progress = (self._step, self._phase)
            self._progress, self._idle = progress, 0.0 if progress != self._progress else self._idle + tick
            try:
                self._post()
                if self._idle > (self._limits.slow if self._slow_phase else self._limits.step):
                    self._hang()
            except RuntimeError:  # torch's DistError: the store is gone, together with its host
                if self._idle > self._limits.step:
                    self._give_up()

    @property
    def _slow_phase(self) -> bool:
        return bool(self._phase) and not self._phase.startswith("after ")

    def _post(self) -> None:
        self._count += 1
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat())))

    def _beat(self) -> Beat:
        line, call = stack_position(self._main)
        return Beat(self._count, self._step, self._idle, self._phase, line, call, socket.gethostname(), os.getpid())

    def _position(self) -> str:
        beat = self._beat()
        return f"rank {self._rank} has done no step for {beat.age:.0f} s: it is in {beat.call}, {beat.line}"

    def _hang(self) -> None:
        """Report the hang on the first rank that calls this, and end every rank after the report. It is called until the process ends."""
        if self._escape is None:
            # A store that cannot be reached would block this thread forever.
            self._escape = threading.Timer(6 * self._limits.interval + 10, self._give_up)
            self._escape.daemon = True
            self._escape.start()
            if self._store.add("reporters", 1) == 1:
                text = self._compose()
                self._print(text)
                self._write(text)
                self._store.set(REPORTED, "1")
        if self._store.check([REPORTED]):
            self._escape.cancel()
            self._end(EXIT_CODE)

    def _give_up(self) -> None:
        """Report this rank alone and end it, because the store does not answer."""
        self._print(
            f"{self._position()}. There is no report of all ranks, because the store of the rendezvous does not answer: this host is cut "
            "off, or the host of the store is gone"
        )
        self._end(EXIT_CODE)

    def _compose(self) -> str:
        """Return a report on all ranks, from their beats at two times."""
        first_beats = self._read()
        self._closed.wait(2.5 * self._limits.interval)
        beats = self._read()
        beats[self._rank] = self._beat()
        silent = [rank for rank, beat in beats.items() if rank != self._rank and beat.count == first_beats[rank].count]
        return hang_report(beats, silent, self._idle)

    def _read(self) -> dict[int, Beat]:
        beats = {}
        for rank in range(self._world_size):
            key = f"beat/{rank}"
            if self._store.check([key]):
                beats[rank] = Beat(**parse_json(self._store.get(key), key))
            else:
                beats[rank] = Beat(0, 0, 0.0, "", "its start", "nothing yet", "unknown host", 0)
        return beats

    def _print(self, text: str) -> None:
        print(f"{self._command}: hang: {text}", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        folder = self._results_dir / "errors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"hang-step-{self._step:07d}.txt").write_text(text + "\n", encoding="utf-8")
        except OSError as error:  # the report was printed, and the run must end
            self._print(f"the report could not be written into {folder}: {error}")


def stack_position(thread: int) -> tuple[str, str]:
    """Return the innermost line of this package and the innermost function of all on the stack of a thread."""
    frame = sys._current_frames().get(thread)
    frames = traceback.extract_stack(frame, limit=None) if frame is not None else []
    # Loggers of torch, and the stand-ins for CUDA, wrap collectives. The wrapped function is of interest.
    call = next((entry.name for entry in reversed(frames) if entry.name not in ("wrapper", "<lambda>", "__torch_function__")), "nothing")
    innermost = next((entry for entry in reversed(frames) if _PACKAGE in entry.filename and _WRAPPERS not in entry.filename), None)
    if innermost is None:
        return "no line of this package", call
    return f"megatron_bagel/{innermost.filename.rsplit(_PACKAGE, 1)[1]}:{innermost.lineno} {innermost.name}", call


def hang_report(beats: dict[int, Beat], silent: Sequence[int], idle: float) -> str:
    """Describe where the ranks are and which of them probably cause the hang: silent ranks, or those away from the majority."""
    lines = [f"no step was done for {idle:.0f} s"]
    for rank in silent:
        beat = beats[rank]
        lines.append(
            f"rank {rank} ({beat.host}, process {beat.pid}) does not answer: it is stopped, or dead, or its host cannot be reached. "
            f"Its last beat was in step {beat.step}, in {beat.call}, {beat.line}"
        )
    groups: dict[tuple[int, str, str, str], list[int]] = {}
    for rank, beat in beats.items():
        if rank not in silent:
            groups.setdefault((beat.step, beat.phase, beat.call, beat.line), []).append(rank)
    majority = max(groups.values(), key=len)
    for (step, phase, call, line), ranks in sorted(groups.items(), key=lambda group: len(group[1])):
        during = f" during {phase}" if phase else ""
        suspect = not silent and len(groups) > 1 and ranks is not majority
        hint = f". The other ranks are elsewhere; look here first, on {beats[ranks[0]].host}" if suspect else ""
        verb = "is" if len(ranks) == 1 else "are"
        lines.append(f"{rank_list(ranks)} {verb} in step {step}{during}, in {call}, {line}{hint}")
    if not silent and len(groups) == 1:
        lines.append("all ranks are at the same line, so the communication itself does not end; look at the network")
    return "\n  ".join(lines)


@contextmanager
def watching(store: dist.Store, limits: Limits, results_dir: str | Path, command: str = COMMAND) -> Iterator[Watchdog]:
    """Run the watchdog of this rank within the block, unless its limit is 0."""
    watchdog = Watchdog(store, dist.get_rank(), dist.get_world_size(), limits, Path(results_dir), os._exit, command)
    if not limits.step:
        yield watchdog
        return
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()
