# SPDX-License-Identifier: Apache-2.0
"""Large files are read whole, and do not stay in memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_bagel.common import page_cache
from megatron_bagel.common.page_cache import large_together, read_fully


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_READ_BYTES", 1 << 12)
    monkeypatch.setattr(page_cache, "large_bytes", lambda: 1 << 14)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 50_001])
@pytest.mark.parametrize("start", [0, 13, 8192])
@pytest.mark.parametrize("forgets", [False, True])
def test_a_read_fills_its_memory(tmp_path: Path, size: int, start: int, forgets: bool) -> None:
    content = os.urandom(start + size + 5)
    (tmp_path / "file").write_bytes(content)
    memory = bytearray(size)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        file.seek(start)
        assert read_fully(file, memoryview(memory), forgets)
        assert file.tell() == start + size
        assert not read_fully(file, memoryview(bytearray(6)), forgets)
    assert memory == content[start : start + size]


def test_files_are_large_together(tmp_path: Path) -> None:
    files = [tmp_path / str(number) for number in range(3)]
    for file in files:
        file.write_bytes(bytes(6000))
    assert large_together(files)
    assert not large_together([*files[:2], tmp_path / "missing"])
