# SPDX-License-Identifier: Apache-2.0
"""Ranks that meet in a store in which others met before agree on a name of their own, whatever those left behind."""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.platform.launch.rendezvous import agree_on_generation


def _meet(path: Path, ranks: list[int], size: int, seconds: float = 60) -> list[str]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: agree_on_generation(dist.FileStore(str(path)), rank, size, timedelta(seconds=seconds)), ranks))


@settings(max_examples=10)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_every_round_has_a_name_of_its_own(sizes: list[int], order: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for size in sizes:
            ranks = list(range(size))
            order.shuffle(ranks)
            found = set(_meet(Path(folder) / "store", ranks, size))
            assert len(found) == 1
            names += found
        assert len(set(names)) == len(sizes)


def test_a_rank_of_an_earlier_round_is_not_taken_for_one_that_came(tmp_path: Path) -> None:
    _meet(tmp_path / "store", [0, 1, 2], 3)
    with pytest.raises(TimeoutError, match=r"1 of 3 ranks did not come to the rendezvous, among them \[2\]"):
        _meet(tmp_path / "store", [0, 1], 3, seconds=3)
