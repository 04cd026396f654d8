# SPDX-License-Identifier: Apache-2.0
"""Flags of what shows a run besides its log lines: timers, a profiler's trace, a file for Prometheus, experiment trackers."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_bagel.config.flag import FREE, flag, megatron_flag


@dataclass
class ObservingArguments:
    """Flags of profiling, under Megatron's names, and of metrics. No setting here changes a result."""

    profile: bool = megatron_flag(
        False,
        "Profile some steps with torch.profiler. Each rank writes a Perfetto trace to results_dir/traces. Profiled steps are slower.",
        on_resume=FREE,
    )
    profile_step_start: int = megatron_flag(10, "First profiled step. Skip the first few, which compile and allocate.", on_resume=FREE)
    profile_step_end: int = megatron_flag(12, "Step before which profiling ends.", on_resume=FREE)
    profile_ranks: list[int] = megatron_flag([0], "Ranks to profile. With pipeline stages, choose one rank of each stage.", on_resume=FREE)
    profile_shapes: bool = flag(False, "Record tensor shapes in the trace. This makes it larger.", on_resume=FREE)
    barrier_timers: bool = flag(
        False,
        "Put a barrier around every timed phase, so that time/... shows a rank's own work without waiting for others. Use it to find a "
        "slow rank; it slows training.",
        on_resume=FREE,
    )
    prometheus_file: str | None = flag(
        None,
        "Write the newest metrics to this .prom file. The textfile collector of node_exporter reads it on the node of rank 0.",
        on_resume=FREE,
    )
    mlflow_uri: str | None = flag(
        None,
        "Log to MLflow: a server's URL, or sqlite:///FILE for a store on this machine. Needs the extra mlflow. A resumed run continues "
        "its entry.",
        on_resume=FREE,
    )
    mlflow_experiment: str = flag("bagel", "MLflow experiment, with mlflow_uri. It is made if it does not exist.", on_resume=FREE)
    trackio_project: str | None = flag(
        None,
        "Log to this project of trackio. Needs the extra trackio. Its own variable TRACKIO_DIR names the folder of its store.",
        on_resume=FREE,
    )
