# SPDX-License-Identifier: Apache-2.0
"""Builds the index of a dataset config, alone or as one of several jobs: plan, write shards with any number of processes, publish.

Everything is written into a build folder that is renamed at the end, so an index is complete or absent. An interrupted build
continues with its unfinished shards.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_bagel.data.index.format import MANIFEST, Manifest, read_manifest
from megatron_bagel.data.index.plan import (
    ROWS_PER_SHARD,
    ImageChecks,
    IndexPlan,
    PlanRules,
    ShardPlan,
    earlier_build_keys,
    plan_index,
)
from megatron_bagel.data.index.publish import INDEX, PLAN, build_folder, finished_shard, locked, publish
from megatron_bagel.data.index.ray_engine import write_in_ray
from megatron_bagel.data.index.shard_writer import write_shard
from megatron_bagel.data.index.source_contents import has_same_sources
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.sources.row_rules import RowRules
from megatron_bagel.data.tokenizer import load_tokenizer, process_tokenizer
from megatron_bagel.platform.launch.child_processes import end_with_client, end_with_parent, starting
from megatron_bagel.platform.launch.ray_cluster import RayCluster

_LOG_SECONDS = 30.0  # between progress lines without a terminal
_shared_row_count: Synchronized[int]  # in a worker process: rows written by all workers together


@dataclass(frozen=True)
class BuildOptions:
    """Options of one build job, which is number ``job_index`` of ``num_jobs`` and writes its share of the shards.

    ``workers`` 0 builds in this process; errors call the number ``workers_flag``. ``cluster`` runs shards as tasks of Ray, and not in
    processes. ``progress`` goes to stderr: a bar, or a line now and then in a log file.
    """

    workers: int = 0
    rows_per_shard: int = ROWS_PER_SHARD
    checks: ImageChecks = ImageChecks()
    row_rules: RowRules = RowRules()
    overwrite: bool = False
    progress: bool = True
    num_jobs: int = 1
    job_index: int = 0
    workers_flag: str = "--workers"
    cluster: RayCluster | None = None

    def __post_init__(self) -> None:
        if self.workers < 0 or self.rows_per_shard < 1:
            raise ValueError(
                f"{self.workers_flag} must be 0 or more and --rows-per-shard 1 or more, got {self.workers} and {self.rows_per_shard}"
            )
        if not 0 <= self.job_index < self.num_jobs:
            raise ValueError(f"--job-index counts from 0 to --num-jobs - 1, got index {self.job_index} of {self.num_jobs} jobs")

    @property
    def plan_rules(self) -> PlanRules:
        """Return the part of the options that decides the index."""
        return PlanRules(self.rows_per_shard, self.checks, self.row_rules)


def build_index(
    groups: Sequence[GroupConfig], tokenizer_path: Path, output: Path, options: BuildOptions = BuildOptions(),
    remedy: str = "give --overwrite or another --output",
) -> Manifest | None:  # fmt: skip
    """Build the index of ``groups`` at ``output``, or return the existing one if it matches.

    It matches although the times of its sources differ, as long as their bytes are the same. ``remedy`` ends the message if it does not.

    One of several jobs writes its shards into a separate folder beside ``output``; ``merge_jobs`` then makes the index.

    Returns:
        The manifest, or None for one of several jobs.

    Raises:
        ValueError: If a source is missing, ``output`` holds something else (unless ``overwrite``), or a dataset has no usable row.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    plan = plan_index(groups, tokenizer, options.plan_rules)
    build = build_folder(output, options.job_index, options.num_jobs)
    with locked(build):
        if output.exists() and not options.overwrite:
            manifest = _check_existing(output, plan, earlier_build_keys(groups, tokenizer, options.plan_rules), remedy)
            shutil.rmtree(build, ignore_errors=True)  # the leftovers of a kill right after publishing
            return manifest
        _prepare(build, plan)
        if not (build / INDEX / MANIFEST).is_file():
            _write_shards(build, plan, tokenizer_path, options)
        return publish(build, plan.summary(), output) if options.num_jobs == 1 else None


def _check_existing(output: Path, plan: IndexPlan, earlier_keys: Collection[str], remedy: str) -> Manifest:
    manifest = read_manifest(output)
    if manifest.build_key not in earlier_keys and not has_same_sources(manifest, plan):
        raise ValueError(f"{output} holds the index of other sources or another tokenizer; {remedy}")
    return manifest


def _prepare(build: Path, plan: IndexPlan) -> None:
    """Keep an unfinished build of the same inputs and remove any other."""
    path, content = build / PLAN, json.dumps(plan.summary())
    if build.exists() and not (path.is_file() and path.read_text() == content):
        shutil.rmtree(build)
    (build / INDEX).mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _write_shards(build: Path, plan: IndexPlan, tokenizer_path: Path, options: BuildOptions) -> None:
    job_shards = plan.shards[options.job_index :: options.num_jobs]
    open_shards = [shard for shard in job_shards if finished_shard(build, shard.group, shard.dataset, shard.name) is None]
    rows, open_rows = (sum(shard.rows for shard in shards) for shards in (job_shards, open_shards))
    tqdm_settings: dict[str, Any] = {} if sys.stderr.isatty() else {"mininterval": _LOG_SECONDS, "maxinterval": _LOG_SECONDS, "ascii": True}
    with tqdm(total=rows, initial=rows - open_rows, unit="row", desc="index", disable=not options.progress, **tqdm_settings) as bar:
        if options.cluster is not None and open_shards:
            for count in write_in_ray(build, open_shards, tokenizer_path, options.cluster):
                bar.update(count)
        elif options.workers == 0 or len(open_shards) < 2:
            for shard in open_shards:
                write_shard(build, shard, process_tokenizer(tokenizer_path), bar.update)
        else:
            for count in _in_processes(build, open_shards, tokenizer_path, options, fresh=plan.is_remote):
                bar.update(count)


def _in_processes(build: Path, shards: Sequence[ShardPlan], tokenizer_path: Path, options: BuildOptions, fresh: bool) -> Iterator[int]:
    """Write shards in worker processes and yield the rows written since the last time, about every second.

    ``fresh`` processes are for remote sources: clients of remote file systems run threads, which do not survive a fork. They are forks of
    a server that imports this package once. Started one by one, each of them would import PyTorch, which takes seconds of a processor.
    """
    context = get_context("forkserver" if fresh else "fork")
    if fresh:
        context.set_forkserver_preload([__name__])
    start = partial(_start_worker, end_with_client if fresh else partial(end_with_parent, os.getpid()))
    with starting(f"{options.workers} worker processes of the build", f"{options.workers_flag} 0 builds in this one"):
        row_count, yielded_rows = context.Value("q"), 0
        workers_pool = ProcessPoolExecutor(min(options.workers, len(shards)), context, start, (row_count,))
    try:
        with workers_pool as pool:
            pending = {pool.submit(_write_in_worker, build, shard, tokenizer_path) for shard in shards}
            while pending:
                finished, pending = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in finished:
                    future.result()
                previous_rows, yielded_rows = yielded_rows, row_count.value
                yield yielded_rows - previous_rows
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process of the build was killed, perhaps because memory ran out; run the same command again with fewer "
            f"{options.workers_flag}: finished shards are kept"
        ) from error


def _start_worker(end_with_builder: Callable[[], None], row_count: Synchronized[int]) -> None:
    end_with_builder()
    global _shared_row_count
    _shared_row_count = row_count
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core per shard; also silences the warning about forks


def _write_in_worker(build: Path, shard: ShardPlan, tokenizer_path: Path) -> None:
    def count(rows: int) -> None:
        with _shared_row_count.get_lock():
            _shared_row_count.value += rows

    write_shard(build, shard, process_tokenizer(tokenizer_path), count)
