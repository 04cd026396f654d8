# SPDX-License-Identifier: Apache-2.0
"""Reads every byte of a latent cache and reports problems by file and image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bagel.common.finite import is_finite
from megatron_bagel.data.index.latent_cache import DTYPES, open_cached_shard
from megatron_bagel.data.index.sequences import StoredSequences, sequence_count


def cached_shard_problems(folder: Path, manifest: Mapping[str, Any], label: str) -> Iterator[str]:
    """Yield a sentence for each problem of one shard of a latent cache.

    The check compares sizes and checksums with the manifest, and finds posteriors that are damaged or not finite.

    Args:
        folder: The folder of the cache.
        manifest: The content of its ``latents.json``.
        label: ``group/dataset/shard``, a key of the manifest's ``files``.
    """
    try:
        count = sequence_count(folder / f"{label}.idx")
        shard = open_cached_shard(folder, label, manifest["files"], count, check_all=True)
    except (ValueError, OSError) as error:
        yield f"{label}: {error}"
        return
    for image in range(count):
        if problem := _posterior_problem(shard, image, DTYPES[manifest["dtype"]]):
            yield f"{label} image {image}: {problem}"


def _posterior_problem(shard: StoredSequences, image: int, dtype: torch.dtype) -> str | None:
    try:
        data = np.array(shard.read(image))
    except ValueError as error:
        return str(error)
    if not len(data) or len(data) % (2 * dtype.itemsize):
        return f"{len(data)} bytes are no mean and variance of {dtype} numbers"
    return None if is_finite(torch.from_numpy(data).view(dtype)) else "its posterior holds NaN or infinite values; make the cache again"
