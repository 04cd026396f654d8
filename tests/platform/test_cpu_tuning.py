# SPDX-License-Identifier: Apache-2.0
"""Memory settings of CPU runs: what is asked of torch and of glibc, and that both do it. ``benchmarks.page_faults`` measures the gain."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_bagel.platform import cpu_tuning
from tests.conftest import ROOT

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h
MIB = 1 << 20


class FakeLibrary:
    """A C library that records its ``mallopt`` calls and answers every one with ``answer``."""

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.calls: list[tuple[int, int]] = []

    def mallopt(self, parameter: int, value: int) -> int:
        self.calls.append((parameter, value))
        return self.answer


@pytest.fixture
def no_malloc_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MALLOC_SETTINGS:
        monkeypatch.delenv(name, raising=False)


def mallopt_calls(monkeypatch: pytest.MonkeyPatch, answer: int = 1, system: str = "linux") -> list[tuple[int, int]]:
    """The calls that ``keep_freed_memory`` makes on such a system. The real library is not touched."""
    library = FakeLibrary(answer)
    monkeypatch.setattr(cpu_tuning, "ctypes", SimpleNamespace(CDLL=lambda name: library))
    monkeypatch.setattr(cpu_tuning, "sys", SimpleNamespace(platform=system))
    cpu_tuning.keep_freed_memory()
    return library.calls


def test_huge_pages_are_asked_for_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(HUGE_PAGES, raising=False)
    cpu_tuning.use_huge_pages()
    assert os.environ[HUGE_PAGES] == "1"


def test_the_users_choice_of_pages_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HUGE_PAGES, "0")
    cpu_tuning.use_huge_pages()
    assert os.environ[HUGE_PAGES] == "0"


def test_the_mmap_threshold_is_set_before_the_trim_threshold(no_malloc_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mallopt_calls(monkeypatch) == [(MMAP_THRESHOLD, 32 * MIB), (TRIM_THRESHOLD, 2**31 - 1)]


def test_a_refused_mmap_threshold_leaves_the_trim_threshold_alone(no_malloc_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mallopt_calls(monkeypatch, answer=0) == [(MMAP_THRESHOLD, 32 * MIB)]


@pytest.mark.parametrize("name", MALLOC_SETTINGS)
def test_the_users_malloc_settings_stay(name: str, no_malloc_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    assert mallopt_calls(monkeypatch) == []


def test_other_systems_and_libraries_are_left_alone(no_malloc_settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mallopt_calls(monkeypatch, system="darwin") == []
    monkeypatch.delattr(FakeLibrary, "mallopt")
    assert mallopt_calls(monkeypatch) == []


class Mallinfo2(ctypes.Structure):
    """glibc's own counters (malloc.h, 2.33 and later)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]


def glibc_counters() -> Mallinfo2:
    function = ctypes.CDLL(None).mallinfo2
    function.restype = Mallinfo2
    return function()


needs_glibc = pytest.mark.skipif(
    torch.cuda.is_available() or sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
    reason="needs a CPU run on glibc 2.33 or later",
)
default_malloc = pytest.mark.skipif(any(name in os.environ for name in MALLOC_SETTINGS), reason="malloc is set by the environment")


def in_a_fresh_process(check: str) -> None:
    """Run a function of this file where the heap is small: malloc takes a free chunk before it asks whether to map a new block."""
    code = f"from megatron_bagel import platform; platform.install(); from tests.platform import test_cpu_tuning as t; t.{check}()"
    # Commands that stream tensors set malloc's variables for their process; one of them may have run in this one.
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_glibc
@default_malloc
@pytest.mark.parametrize("check", ["keeps_a_block_below_the_threshold", "returns_a_block_above_the_threshold"])
def test_glibc_with_freed_blocks(check: str) -> None:
    in_a_fresh_process(check)


def keeps_a_block_below_the_threshold() -> None:
    before = glibc_counters()
    block = torch.ones(24 * MIB // 4)
    used = glibc_counters()
    assert used.hblks == before.hblks, "the block has a mapping of its own, which glibc returns when the block is freed"
    del block
    freed = glibc_counters()
    assert freed.arena >= used.arena, "glibc gave memory back to the kernel"
    assert freed.fordblks >= 24 * MIB


def returns_a_block_above_the_threshold() -> None:
    before = glibc_counters()
    block = torch.ones(40 * MIB // 4)
    assert glibc_counters().hblks == before.hblks + 1
    del block
    assert glibc_counters().hblks == before.hblks


def mapping_flags(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds ``address`` (``VmFlags`` in proc_pid_smaps(5))."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "VmFlags:":
            return line.split()[1:]
    raise ValueError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="only CPU runs ask for huge pages")
@pytest.mark.skipif(os.environ.get(HUGE_PAGES) != "1", reason="huge pages are turned off by the environment")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel knows no huge pages")
def test_torch_asks_for_huge_pages() -> None:
    block = torch.ones(256 * MIB // 4)
    assert "hg" in mapping_flags(block.data_ptr() + 128 * MIB)
