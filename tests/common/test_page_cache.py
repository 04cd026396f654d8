# SPDX-License-Identifier: Apache-2.0
"""Large files are read and written whole, and do not stay in memory."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_bagel.common import page_cache
from megatron_bagel.common.page_cache import WriteBehind, read_fully


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_READ_BYTES", 1 << 12)
    monkeypatch.setattr(page_cache, "_FLUSHED_BYTES", 1 << 12)
    monkeypatch.setattr(page_cache, "large_bytes", lambda: 1 << 14)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 50_001])
@pytest.mark.parametrize("start", [0, 13, 8192])
@pytest.mark.parametrize("read_once", [False, True])
def test_a_read_fills_its_memory(tmp_path: Path, size: int, start: int, read_once: bool) -> None:
    content = os.urandom(start + size + 5)
    (tmp_path / "file").write_bytes(content)
    memory = bytearray(size)
    with (tmp_path / "file").open("rb", buffering=0) as file:
        file.seek(start)
        assert read_fully(file, memoryview(memory), read_once)
        assert file.tell() == start + size
        assert not read_fully(file, memoryview(bytearray(6)), read_once)
    assert memory == content[start : start + size]


@pytest.mark.parametrize("size", [100, 50_001])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_is_written_behind_is_all_there(tmp_path: Path, size: int, backwards: bool) -> None:
    content = os.urandom(size)
    places = range(0, size, 3000)
    with (tmp_path / "file").open("wb") as file:
        behind = WriteBehind(file, size)
        for place in reversed(places) if backwards else places:
            file.seek(place)
            file.write(content[place : place + 3000])
            behind.wrote()
        behind.close()
        behind.close()
    assert (tmp_path / "file").read_bytes() == content


def test_a_file_may_be_closed_before(tmp_path: Path) -> None:
    """torch's writer closes its file itself."""
    with (tmp_path / "file").open("wb") as file:
        behind = WriteBehind(file, 50_000)
        file.write(bytes(50_000))
        behind.wrote()
    behind.close()


def test_an_error_of_the_disk_reaches_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fdatasync", fails)
    with (tmp_path / "file").open("wb") as file:
        behind = WriteBehind(file, 50_000)
        file.write(bytes(5000))
        behind.wrote()
        with pytest.raises(OSError, match="no space left"):
            behind.close()
