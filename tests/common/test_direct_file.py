# SPDX-License-Identifier: Apache-2.0
"""What is written past the page cache is the same file, whatever the sizes and places of the writes."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path
from random import Random

import pytest

from megatron_bagel.common import direct_file
from megatron_bagel.common.direct_file import DirectFile, open_to_write


@pytest.fixture(autouse=True)
def _small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "_BUFFER_BYTES", 1 << 13)
    monkeypatch.setattr(direct_file, "large_bytes", lambda: 1 << 14)


@pytest.fixture(params=["direct", "a file system without it"])
def path(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file to write with direct writes, and one whose file system refuses them."""
    if request.param == "direct":
        with open_to_write(tmp_path / "probe", 1 << 20) as file:
            if not isinstance(file, DirectFile):
                pytest.skip("the folder of temporary files has no direct writes")
    else:
        monkeypatch.setattr(direct_file, "_open_direct", lambda _path: None)
    yield tmp_path / "file"


def _pieces(size: int, random: Random) -> Iterator[tuple[int, int]]:
    """Yield starts and ends of writes, from some bytes to several buffers."""
    start = 0
    while start < size:
        end = min(size, start + random.choice([1, 100, 4095, 4096, 8192, 30_000]))
        yield start, end
        start = end


@pytest.mark.parametrize("size", [1, 4096, 20_000, 131_072, 150_001])
@pytest.mark.parametrize("seed", range(3))
def test_pieces_one_after_another(path: Path, size: int, seed: int) -> None:
    content = os.urandom(size)
    with open_to_write(path, 1 << 20) as file:
        for start, end in _pieces(size, Random(seed)):
            assert file.tell() == start
            assert file.write(memoryview(content)[start:end]) == end - start
    assert path.read_bytes() == content


@pytest.mark.parametrize("seed", range(10))
def test_pieces_in_any_order(path: Path, seed: int) -> None:
    random, content = Random(seed), os.urandom(150_001)
    pieces = list(_pieces(len(content), random))
    random.shuffle(pieces)
    with open_to_write(path, 1 << 20) as file:
        for start, end in pieces:
            file.seek(start)
            memory = bytearray(content[start:end])
            file.write(memory)
            memory[:] = bytes(len(memory))  # the caller may use it again at once
    assert path.read_bytes() == content


def test_a_flush_shows_what_was_written(path: Path) -> None:
    content = os.urandom(50_001)
    with open_to_write(path, 1 << 20) as file:
        for start in range(0, len(content), 7001):
            file.write(content[start : start + 7001])
            file.flush()
            assert path.read_bytes() == content[: start + 7001]
            os.fsync(file.fileno())
        file.close()  # torch's writer closes its file itself
    assert path.read_bytes() == content


def test_a_disk_with_larger_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def larger_blocks(descriptor: int, content: memoryview, place: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT and (place % 16_384 or len(content) % 16_384):
            raise OSError(errno.EINVAL, "invalid argument")
        return write(descriptor, content, place)

    monkeypatch.setattr(os, "pwrite", larger_blocks)
    content = os.urandom(150_001)
    with open_to_write(path, 1 << 20) as file:
        for start, end in _pieces(len(content), Random(0)):
            file.write(content[start:end])
    assert path.read_bytes() == content


def test_small_files_are_plain(tmp_path: Path) -> None:
    with open_to_write(tmp_path / "file", 1000) as file:
        assert isinstance(file, BufferedWriter)


def test_an_error_of_the_disk_reaches_the_writer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_descriptor: int, _content: object, _place: int) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    file = open_to_write(path, 1 << 20)
    if not isinstance(file, DirectFile):
        pytest.skip("there the system's own writes are used")
    monkeypatch.setattr(os, "pwrite", fails)
    file.write(bytes(10_000))
    with pytest.raises(OSError, match="no space left"):
        file.close()
    assert file.closed
