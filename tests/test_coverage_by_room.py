# SPDX-License-Identifier: Apache-2.0
"""The table of coverage sums files over the package's folders."""

from __future__ import annotations

from tests.coverage_by_room import lines_by_room, table


def test_files_are_summed_by_room() -> None:
    files = {
        "megatron_bagel/layout/pack.py": (8, 10),
        "megatron_bagel/data/index/build.py": (3, 4),
        "megatron_bagel/data/tokenizer.py": (1, 2),
        "megatron_bagel/__init__.py": (1, 1),
    }
    rooms = lines_by_room(files)
    assert rooms == {"data": (4, 6), "layout": (8, 10), "megatron_bagel": (1, 1)}
    lines = [line.split() for line in table(rooms).splitlines()]
    assert [line[:3] for line in lines] == [
        ["data", "66.7%", "4"],
        ["layout", "80.0%", "8"],
        ["megatron_bagel", "100.0%", "1"],
        ["total", "76.5%", "13"],
    ]
