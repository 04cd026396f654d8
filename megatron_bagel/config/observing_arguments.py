"""What one can see of a run besides its log lines: timers, a profiler's trace, a file for Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.config.arguments import flag


@dataclass
class ObservingArguments:
    """Profiling under Megatron's names; no setting here changes a result."""

    profile: bool = flag(
        False, "Profile some steps with torch's profiler: a trace per rank for Perfetto in traces/ of results_dir. Slows these steps."
    )
    profile_step_start: int = flag(10, "First profiled step; later than the first few, which compile and allocate.")
    profile_step_end: int = flag(12, "The step before which profiling ends.")
    profile_ranks: list[int] = flag([0], "Ranks that profile. With pipeline stages, one of each stage tells more than many of one.")
    profile_shapes: bool = flag(False, "Write the shapes of tensors into the trace too; it gets larger.")
    barrier_timers: bool = flag(
        False,
        "Let all ranks meet around every timed phase, so that time/... is a rank's own work without the wait for others. To look for a "
        "slow rank; slows training.",
    )
    prometheus_file: str | None = flag(
        None, "Write the newest numbers to this .prom file, for the textfile collector of Prometheus' node_exporter on the node of rank 0."
    )
