# SPDX-License-Identifier: Apache-2.0
"""The files of a model that is large as a whole do not stay in the page cache, however small each of them is."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, ShardedWriter
from megatron_bagel.common import direct_file, page_cache

SPECS = {f"w{number}": ((300, 1000), torch.float32) for number in range(5)}  # 1.2 MB each
MODEL_BYTES = 6_000_000


def residency(file: Path) -> list[bool]:
    """Which pages of a file the system holds in memory."""
    size = file.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_COPY) as content:
        place = ctypes.addressof(ctypes.c_char.from_buffer(content))
        if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(place), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore")
    return [bool(page & 1) for page in pages]


def cached_share(file: Path) -> float:
    """The share of a file's pages that the system holds in memory."""
    pages = residency(file)
    return sum(pages) / len(pages)


def forget(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture(scope="module", autouse=True)
def _disk_that_can_forget(tmp_path_factory: pytest.TempPathFactory) -> None:
    probe = tmp_path_factory.mktemp("probe") / "file"
    probe.write_bytes(bytes(1_000_000))
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no direct writes")
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_DIRECT))
        forget(probe)
        left = cached_share(probe)
    except (OSError, AttributeError) as error:
        pytest.skip(f"this system cannot tell what it keeps in memory: {error}")
    if left:
        pytest.skip("the folder of temporary files is in memory")


@pytest.mark.parametrize("large", [True, False])
def test_shards_are_judged_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    limit: Callable[[], int] = lambda: MODEL_BYTES // 2 if large else 2 * MODEL_BYTES  # noqa: E731
    monkeypatch.setattr(direct_file, "large_bytes", limit)
    monkeypatch.setattr(page_cache, "large_bytes", limit)
    values = {name: torch.randn(shape) for name, (shape, _) in SPECS.items()}
    with ShardedWriter(tmp_path / "model.safetensors", SPECS, shard_bytes=2_000_000) as writer:
        for name, value in values.items():
            writer.write(name, value)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == len(SPECS)
    # The first and the last block of a file may pass the cache.
    assert all(cached_share(file) < 0.05 for file in files) == large
    for file in files:
        forget(file)
    reader = SafetensorsReader(tmp_path / "model.safetensors.index.json", read_once=True)
    assert all(torch.equal(reader.get(name), value) for name, value in values.items())
    assert all(cached_share(file) < 0.05 for file in files) == large


@pytest.mark.parametrize("fails_at", ["the first buffer", "the end"])
def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    monkeypatch.setattr(direct_file, "large_bytes", lambda: 0)
    monkeypatch.setattr(direct_file, "_BUFFER_BYTES", 1 << 16 if fails_at == "the first buffer" else 1 << 24)

    def fails(_descriptor: int, _content: object, _place: int) -> int:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(OSError, match="no space left"), ShardedWriter(tmp_path / "model.safetensors", SPECS) as writer:
        for name, (shape, dtype) in SPECS.items():
            writer.write(name, torch.zeros(shape, dtype=dtype))
    assert not list(tmp_path.iterdir())
