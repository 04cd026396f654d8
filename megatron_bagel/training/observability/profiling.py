# SPDX-License-Identifier: Apache-2.0
"""Profiles a window of steps with torch's profiler on chosen ranks. Each writes one trace for Perfetto or chrome://tracing."""

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
    """Profiles the steps from ``--profile_step_start`` to before ``--profile_step_end`` into ``results_dir/traces``.

    A run that resumes inside the window profiles the rest of it. A run that ends inside it, also by an error, writes the steps so far.
    """

    def __init__(self, flags: ObservingArguments, results_dir: str | Path, rank: int) -> None:
        self._flags, self._rank = flags, rank
        self._folder = Path(results_dir) / TRACES
        self._is_profiled = flags.profile and rank in flags.profile_ranks
        self._running: tuple[profile, int] | None = None
        self._next_step = 0

    def before_step(self, step: int) -> None:
        self._next_step = step + 1
        is_inside = self._is_profiled and self._flags.profile_step_start <= step < self._flags.profile_step_end
        if is_inside and self._running is None:
            self._running = self._start(), step
        elif not is_inside and self._running is not None:
            self._write(*self._running, step)

    def close(self) -> None:
        if self._running is not None:
            self._write(*self._running, self._next_step)

    def _start(self) -> profile:
        profiler = profile(activities=profiled_activities(), record_shapes=self._flags.profile_shapes)
        profiler.start()
        return profiler

    def _write(self, profiler: profile, first: int, end: int) -> None:
        self._running = None
        profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"rank{self._rank}_steps{first}-{end - 1}.json.gz"
        with replacing(path) as unfinished:  # somebody may be copying traces at this moment
            profiler.export_chrome_trace(str(unfinished))
        logger.info("the profile of steps %d to %d on rank %d is in %s", first, end - 1, self._rank, path)
