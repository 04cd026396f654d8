# SPDX-License-Identifier: Apache-2.0
"""A run that reads its index from an object store gives the numbers of one that reads a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.object_store import running_store, upload
from tests.runs import make_world, numbers, run, run_config

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_run_from_a_store_is_the_same_run(tmp_path: Path) -> None:
    """Read by the ranks and their workers, with the planning files at first fetched by one of them, and resumed."""
    world = make_world(tmp_path / "world")
    expected = numbers(run(run_config(world, tmp_path / "folder", total_steps=4)))
    with running_store() as store:
        upload(world / "index", f"{store}/index")
        flags = {"index_dir": f"{store}/index", "index_cache_dir": str(tmp_path / "cache"), "num_workers": 2}
        run(run_config(world, tmp_path / "store", total_steps=2, **flags))
        assert numbers(run(run_config(world, tmp_path / "store", total_steps=4, index_cache_bytes=10**9, **flags))) == expected
    assert list((tmp_path / "cache").rglob("*.bin"))
