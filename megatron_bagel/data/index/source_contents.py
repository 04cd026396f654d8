# SPDX-License-Identifier: Apache-2.0
"""Whether the sources of an index still have the bytes it was built from, although their times differ.

A copy or ``touch`` changes the time of a file and nothing else. The index therefore records size and CRC-32 of every local source.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_bagel.common.files import crc32
from megatron_bagel.data.index.format import Manifest, SourceInfo
from megatron_bagel.data.index.plan import IndexPlan
from megatron_bagel.data.sources.files import is_remote
from megatron_bagel.data.sources.rows import SourceUnit

logger = logging.getLogger(__name__)


def source_checksums(units: Iterable[SourceUnit]) -> dict[str, tuple[int, int]]:
    """Return (bytes, crc32) by number of every local source whose first row is in ``units``. The caller has just read these files."""
    return {
        str(unit.source): (Path(unit.path).stat().st_size, crc32(Path(unit.path)))
        for unit in units
        if unit.first_row == 0 and not is_remote(unit.path)
    }


def has_same_sources(manifest: Manifest, plan: IndexPlan) -> bool:
    """Return whether ``plan`` describes the index of ``manifest``: equal inputs, and sources of equal contents.

    It reads every source when only their times differ. An index of an earlier version, and remote sources, match by their times alone.
    """
    if manifest.build_key == plan.build_key:
        return True
    if manifest.inputs_key is None or manifest.inputs_key != plan.inputs_key:
        return False
    sources = [source for dataset in manifest.datasets for source in dataset.sources if source.rows]
    if any(source.bytes is None or _size(source) != source.bytes for source in sources):
        return False
    logger.info("the times of sources differ from those in the index: comparing the contents of %d file(s)", len(sources))
    with ThreadPoolExecutor(4) as pool:  # zlib releases Python's lock
        return all(pool.map(_has_recorded_content, sources))


def _size(source: SourceInfo) -> int | None:
    path = Path(source.path)
    return path.stat().st_size if path.is_file() else None


def _has_recorded_content(source: SourceInfo) -> bool:
    return crc32(Path(source.path)) == source.crc32
