"""A window of steps under torch's profiler, on the ranks that are asked for: one trace per rank, for Perfetto or chrome://tracing."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.profiler import profile

from megatron_bagel.common.files import replacing
from megatron_bagel.config.observing_arguments import ObservingArguments
from megatron_bagel.platform.device import profiled_activities
from megatron_bagel.training.hooks import StepHook

logger = logging.getLogger(__name__)
TRACES = "traces"


class ProfilerWindow(StepHook):
    """Profiles the steps ``--profile_step_start`` to ``--profile_step_end`` (not included) into ``results_dir/traces``.

    A run that resumes inside the window profiles the rest of it; one that ends inside it, by an error too, writes what it has.
    """

    def __init__(self, flags: ObservingArguments, results_dir: str | Path, rank: int) -> None:
        self._flags, self._rank = flags, rank
        self._folder = Path(results_dir) / TRACES
        self._wanted = flags.profile and rank in flags.profile_ranks
        self._running: tuple[profile, int] | None = None
        self._next = 0

    def before_step(self, step: int) -> None:
        self._next = step + 1
        inside = self._wanted and self._flags.profile_step_start <= step < self._flags.profile_step_end
        if inside and self._running is None:
            self._running = self._start(), step
        elif not inside and self._running is not None:
            self._write(*self._running, step)

    def close(self) -> None:
        if self._running is not None:
            self._write(*self._running, self._next)

    def _start(self) -> profile:
        profiler = profile(activities=profiled_activities(), record_shapes=self._flags.profile_shapes)
        profiler.start()
        return profiler

    def _write(self, profiler: profile, first: int, end: int) -> None:
        self._running = None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._rank}_steps{first}-{end - 1}.json.gz"
        with replacing(path) as unfinished:  # somebody may be copying traces meanwhile
            profiler.export_chrome_trace(str(unfinished))
        logger.info("steps %d to %d of rank %d are profiled in %s", first, end - 1, self._rank, path)
