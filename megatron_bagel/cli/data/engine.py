# SPDX-License-Identifier: Apache-2.0
"""``--engine``: what shares the shards of an index or of a latent cache. The bytes are the same whatever is chosen."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_bagel.platform.launch.ray_cluster import RayCluster

ENGINES = ("processes", "slurm-array", "ray")
_SLURM = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "COUNT")]


@dataclass(frozen=True)
class Engine:
    """Job ``job_index`` of ``num_jobs``, and the Ray cluster that does its work if there is one."""

    num_jobs: int = 1
    job_index: int = 0
    cluster: RayCluster | None = None


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``chosen_engine`` reads."""

    def flag(name: str, **settings: Any) -> None:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)

    flag("engine", choices=ENGINES, default=ENGINES[0], help="what does the work: this machine (processes, default); the tasks of a Slurm "
         "array, each of which takes its number from Slurm (slurm-array); or a Ray cluster, which starts the shard of a lost worker "
         "again (ray)")  # fmt: skip
    flag("ray_address", metavar="URL", help="a Ray cluster, such as ray://head:10001, whose machines share all folders; without it, Ray "
         "starts on this machine for as long as the command runs")  # fmt: skip
    flag("num_jobs", type=int, help="number of jobs that share the shards (default 1; with --engine slurm-array, the tasks of the array)")
    flag("job_index", type=int, help="number of this job, from 0 (default 0; with --engine slurm-array, the number of the task)")


def chosen_engine(args: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Engine:
    """Return the engine of a command line. ``args.workers`` limits a Ray that is started here.

    Raises ValueError if its flags do not fit each other, or Slurm's variables are not those of an array.
    """
    if args.ray_address is not None and args.engine != "ray":
        raise ValueError(f"--ray_address {args.ray_address} needs --engine ray")
    if args.engine == "ray":
        if args.num_jobs is not None or args.job_index is not None:
            raise ValueError("--engine ray shares the shards itself; leave out --num-jobs and --job-index")
        return Engine(cluster=RayCluster(args.ray_address, args.workers))
    if args.engine == "slurm-array":
        if args.job_index is not None:
            raise ValueError("--engine slurm-array takes the number of the job from Slurm; leave out --job-index")
        return _array_task(args.num_jobs, environment)
    return Engine(1 if args.num_jobs is None else args.num_jobs, 0 if args.job_index is None else args.job_index)


def _array_task(num_jobs: int | None, environment: Mapping[str, str]) -> Engine:
    """Return the job of this task of a Slurm array from 0 to N - 1. A part of an array, submitted again, needs ``num_jobs``."""
    needed = _SLURM[:1] if num_jobs is not None else _SLURM
    missing = [name for name in needed if not environment.get(name, "").isdigit()]
    if missing:
        raise ValueError(f"--engine slurm-array runs in a task of a Slurm array (sbatch --array=0-15), and {missing[0]} is not set")
    task, *array = (int(environment[name]) for name in needed)
    if num_jobs is not None:
        return Engine(num_jobs, task)
    first, last, count = array
    if (first, last) != (0, count - 1):
        raise ValueError(
            f"the Slurm array has {count} tasks from {first} to {last}; number them from 0 to N - 1, or give --num-jobs if only some "
            "of the tasks were submitted again"
        )
    return Engine(count, task)
