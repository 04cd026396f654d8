# SPDX-License-Identifier: Apache-2.0
"""Settings of torch and the C library that make memory cheaper on a CPU: huge pages, and freed memory that the process keeps."""

from __future__ import annotations

import ctypes
import os
import sys

_MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def use_huge_pages() -> None:
    """Let torch request 2 MiB pages from Linux for large tensors, so a step's temporaries cost a tenth of the page faults.

    torch reads the variable at its first allocation. A value that the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next temporary instead of returning it to the system and faulting it in again.

    The page faults took a quarter of the autoencoder's time. Blocks of 32 MiB and more (glibc's limit) still return at once. Other
    C libraries and settings of the user stay untouched. A freed block is not always the one that is used next: when a small block has
    taken part of it, the next temporary faults in new memory once (``benchmarks.page_faults``).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in _MALLOC_SETTINGS):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if mallopt(mmap_threshold, 32 << 20):
        # Setting one threshold stops glibc from adapting the other, so the second call needs the first to succeed.
        mallopt(trim_threshold, (1 << 31) - 1)
