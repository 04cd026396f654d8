# SPDX-License-Identifier: Apache-2.0
"""A run that reads its index from an object store gives the numbers of one that reads a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.data.index.format import read_manifest
from tests.object_store import running_store, upload
from tests.runs import make_world, numbers, run, run_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def smallest_cache(index: Path) -> int:
    """Bytes of the files that stay, and of the largest ``.bin``: any other shard must go before that one can come."""
    sizes = [entry for dataset in read_manifest(index).datasets for shard in dataset.shards for entry in shard.files.items()]
    data = [size for ending, (size, _) in sizes if ending == "bin"]
    return (index / "manifest.json").stat().st_size + sum(size for _, (size, _) in sizes) - sum(data) + max(data)


def test_a_run_from_a_store_is_the_same_run(tmp_path: Path) -> None:
    """Read by the ranks and their workers, with the planning files at first fetched by one of them, and resumed with hardly any space."""
    world = make_world(tmp_path / "world")
    expected = numbers(run(run_config(world, tmp_path / "folder", total_steps=4)))
    with running_store() as store:
        upload(world / "index", f"{store}/index")
        flags = {"index_dir": f"{store}/index", "index_cache_dir": str(tmp_path / "cache"), "num_workers": 2}
        run(run_config(world, tmp_path / "store", total_steps=2, **flags))
        assert len(list((tmp_path / "cache").rglob("*.bin"))) == 4
        flags["index_cache_bytes"] = smallest_cache(world / "index")
        assert numbers(run(run_config(world, tmp_path / "store", total_steps=4, **flags))) == expected
    data = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.bin")]
    assert data and sum(data) <= max(path.stat().st_size for path in (world / "index").rglob("*.bin"))
