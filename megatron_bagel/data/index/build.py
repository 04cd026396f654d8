"""Builds the index of a dataset config, alone or as one of several jobs: plan, write shards with any number of processes, publish.

Everything is written into a build folder and renamed at the end, so an index is whole or not there. A build that was cut off goes
on with the shards it had not finished.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from tqdm import tqdm

from megatron_bagel.data.index.format import MANIFEST, Manifest, read_manifest
from megatron_bagel.data.index.plan import ROWS_PER_SHARD, ImageChecks, IndexPlan, ShardPlan, plan_index
from megatron_bagel.data.index.publish import INDEX, PLAN, build_folder, finished_shard, locked, publish
from megatron_bagel.data.index.shard_writer import write_shard
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer

_LOG_SECONDS = 30.0  # between progress lines where there is no terminal
_written: Synchronized | None = None  # in a worker process: rows written by all workers together


@dataclass(frozen=True)
class BuildOptions:
    """``workers`` 0 builds in this process. Of ``num_jobs`` jobs this one, ``job_index``, writes its share of the shards.

    ``progress`` goes to stderr: a bar, or in a log file a line now and then.
    """

    workers: int = 0
    rows_per_shard: int = ROWS_PER_SHARD
    checks: ImageChecks = ImageChecks()
    overwrite: bool = False
    progress: bool = True
    num_jobs: int = 1
    job_index: int = 0

    def __post_init__(self) -> None:
        if self.workers < 0 or self.rows_per_shard < 1:
            raise ValueError(f"--workers must be 0 or more and --rows-per-shard 1 or more, got {self.workers} and {self.rows_per_shard}")
        if not 0 <= self.job_index < self.num_jobs:
            raise ValueError(f"--job-index counts from 0 to --num-jobs - 1, got index {self.job_index} of {self.num_jobs} jobs")


def build_index(
    groups: Sequence[GroupConfig], tokenizer_path: Path, output: Path, options: BuildOptions = BuildOptions()
) -> Manifest | None:
    """Build the index of ``groups`` at ``output`` and return its manifest; one that is there and still fits is returned as it is.

    One of several jobs writes its shards into a folder of its own beside ``output`` and returns None; `merge_jobs` then makes the
    index. Raises ValueError when a source is missing, when ``output`` holds something else (unless ``overwrite``), or when not one
    row of a dataset is usable.
    """
    tokenizer = load_tokenizer(tokenizer_path)
    plan = plan_index(groups, tokenizer, options.rows_per_shard, options.checks)
    build = build_folder(output, options.job_index, options.num_jobs)
    with locked(build):
        if output.exists() and not options.overwrite:
            manifest = _existing(output, plan.build_key)
            shutil.rmtree(build, ignore_errors=True)  # what a kill right after publishing left over
            return manifest
        _prepare(build, plan)
        if not (build / INDEX / MANIFEST).is_file():
            _write_shards(build, plan, tokenizer_path, options)
        return publish(build, plan.summary(), output) if options.num_jobs == 1 else None


def _existing(output: Path, build_key: str) -> Manifest:
    manifest = read_manifest(output)
    if manifest.build_key != build_key:
        raise ValueError(f"{output} holds the index of other sources or another tokenizer; give --overwrite or another --output")
    return manifest


def _prepare(build: Path, plan: IndexPlan) -> None:
    """An unfinished build of the same inputs is continued, any other is removed."""
    path, content = build / PLAN, json.dumps(plan.summary())
    if build.exists() and not (path.is_file() and path.read_text() == content):
        shutil.rmtree(build)
    (build / INDEX).mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def _write_shards(build: Path, plan: IndexPlan, tokenizer_path: Path, options: BuildOptions) -> None:
    mine = plan.shards[options.job_index :: options.num_jobs]
    todo = [shard for shard in mine if finished_shard(build, shard.group, shard.dataset, shard.name) is None]
    rows, left = (sum(shard.rows for shard in shards) for shards in (mine, todo))
    pause = {} if sys.stderr.isatty() else {"mininterval": _LOG_SECONDS, "maxinterval": _LOG_SECONDS, "ascii": True}
    with tqdm(total=rows, initial=rows - left, unit="row", desc="index", disable=not options.progress, **pause) as bar:
        if options.workers == 0 or len(todo) < 2:
            for shard in todo:
                write_shard(build, shard, _tokenizer(tokenizer_path), bar.update)
        else:
            for count in _in_processes(build, todo, tokenizer_path, options.workers, spawn=plan.is_remote):
                bar.update(count)


def _in_processes(build: Path, todo: Sequence[ShardPlan], tokenizer_path: Path, workers: int, spawn: bool) -> Iterator[int]:
    """Write shards in worker processes; yields the rows done since the last time, about every second.

    Clients of remote file systems run threads, which do not survive a fork, so ``spawn`` starts fresh processes for them.
    """
    context = get_context("spawn" if spawn else "fork")
    written, seen = context.Value("q"), 0
    try:
        with ProcessPoolExecutor(min(workers, len(todo)), context, _start_worker, (written,)) as pool:
            running = {pool.submit(_write_in_worker, build, shard, tokenizer_path) for shard in todo}
            while running:
                done, running = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                before, seen = seen, written.value
                yield seen - before
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process of the build was killed, perhaps for want of memory; run the same command again, with fewer --workers: "
            "finished shards are kept"
        ) from error


def _start_worker(written: Synchronized) -> None:
    global _written
    _written = written
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one shard, one core; also silences the warning about forks


def _write_in_worker(build: Path, shard: ShardPlan, tokenizer_path: Path) -> None:
    def count(rows: int) -> None:
        with _written.get_lock():
            _written.value += rows

    write_shard(build, shard, _tokenizer(tokenizer_path), count)


@lru_cache(maxsize=1)
def _tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of this process, loaded once."""
    return load_tokenizer(path)
