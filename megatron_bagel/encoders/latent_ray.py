# SPDX-License-Identifier: Apache-2.0
"""Encodes the shards of a latent cache with actors of Ray. Each has a GPU, if the cluster has any, and loads the autoencoder once.

Ray starts a lost actor again, and the shard that it had begun.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bagel import platform
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.latent_writer import CacheOptions, ShardWork, write_latent_shard
from megatron_bagel.platform.launch.ray_cluster import MAX_RETRIES, RayCluster, attempt, connected, finished_parts, remove_attempts


@dataclass(frozen=True)
class LatentJob:
    """What an actor needs besides the shard: folders and files that every machine of the cluster sees, and the type of the numbers."""

    index: Path
    weights: Path
    output: Path
    dtype: str

    def absolute(self) -> LatentJob:
        """Return the job with paths from the root."""
        return LatentJob(self.index.absolute(), self.weights.absolute(), self.output.absolute(), self.dtype)


def encode_in_ray(job: LatentJob, cluster: RayCluster, shards: Sequence[ShardWork]) -> Iterator[int]:
    """Encode shards with actors of a Ray cluster, and yield the number of images of each that is done.

    Raises:
        ValueError: Ray is not installed or cannot be reached, or a shard fails.
    """
    job, work = job.absolute(), {shard.name: shard for shard in shards}
    remove_attempts(job.output)
    if not shards:
        return
    with connected(cluster) as ray:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        share = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
        encoder = ray.remote(max_restarts=MAX_RETRIES, max_task_retries=MAX_RETRIES, **share)(_Encoder)
        count = min(len(shards), gpus or max(1, int(resources.get("CPU", 1))))
        actors = [encoder.remote(job) for _ in range(count)]

        def start(actor: Any, name: str) -> Any:
            shard = work[name]
            return actor.write.remote(shard.reader.name, shard.group, shard.number)

        for name in finished_parts(ray, list(work), [partial(start, actor) for actor in actors], "shard"):
            shard = work[name]
            yield shard.reader.info.shards[shard.number].images
    remove_attempts(job.output)


class _Encoder:
    """One actor."""

    def __init__(self, job: LatentJob) -> None:
        platform.install()
        self._job, self._options = job, CacheOptions(job.dtype, platform.device())
        self._index = IndexedSamples.open(job.index)
        self._autoencoder = load_autoencoder(job.weights, flag="--vae").to(self._options.device)

    def write(self, dataset: str, group: GroupConfig, number: int) -> None:
        """Encode one shard."""
        with attempt(self._job.output) as folder:
            write_latent_shard(folder, ShardWork(self._index.datasets[dataset], group, number), self._autoencoder, self._options)
