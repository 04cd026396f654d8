# SPDX-License-Identifier: Apache-2.0
"""Writes the shards of an index as tasks of Ray: on this machine, or on a cluster whose machines share the folder of the index.

A task is a shard. Ray starts the task of a lost worker again, so the bytes are those of one process whatever is killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_bagel.data.index.plan import ShardPlan
from megatron_bagel.data.index.shard_writer import write_shard
from megatron_bagel.data.tokenizer import process_tokenizer
from megatron_bagel.platform.launch.ray_cluster import MAX_RETRIES, RayCluster, attempt, connected, finished_parts, remove_attempts

_MAX_QUEUED = 1024  # shards that wait in Ray for a processor


def write_in_ray(build: Path, shards: Sequence[ShardPlan], tokenizer: Path, cluster: RayCluster) -> Iterator[int]:
    """Write shards as tasks of a Ray cluster and yield the rows of each that is done.

    Every machine of the cluster must see the folders ``build`` and ``tokenizer`` at their absolute paths, and the sources as well.

    Raises:
        ValueError: Ray is not installed or cannot be reached, or a shard fails.
    """
    build, tokenizer = build.absolute(), tokenizer.absolute()
    remove_attempts(build)
    rows = {_label(shard): shard for shard in shards}
    with connected(cluster) as ray:
        task = ray.remote(max_retries=MAX_RETRIES, num_cpus=1)(_write)

        def start(label: str) -> Any:
            return task.remote(build, rows[label], tokenizer)

        # Ray itself queues tasks until a processor is free.
        for label in finished_parts(ray, list(rows), [start] * min(len(rows), _MAX_QUEUED), "shard"):
            yield rows[label].rows
    remove_attempts(build)


def _label(shard: ShardPlan) -> str:
    return f"{shard.group}/{shard.dataset}/{shard.name}"


def _write(build: Path, shard: ShardPlan, tokenizer: Path) -> None:
    """Write one shard in a worker of the cluster."""
    with attempt(build) as folder:
        write_shard(folder, shard, process_tokenizer(tokenizer), lambda _: None)
