"""Settings of torch and of the C library that make memory cheaper on a CPU: huge pages, and freed memory that stays with the process."""

from __future__ import annotations

import ctypes
import os
import sys

_MALLOC_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")


def use_huge_pages() -> None:
    """Let torch ask Linux for 2 MiB pages for its large tensors: a step's temporaries then cost a tenth of the page faults.

    torch reads the variable at its first allocation; a value that the user has set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next temporary instead of handing it back and faulting it in again.

    A quarter of the autoencoder's time went there. Blocks of 32 MiB and more (glibc's limit) still go back at once. Other C libraries,
    and settings of the user, are left alone. A freed block is not always the one that is used next: when a small block has taken part
    of its place, the next temporary faults in new memory once (``benchmarks.page_faults``).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or any(name in os.environ for name in _MALLOC_SETTINGS):
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    if mallopt(mmap_threshold, 32 << 20):
        # Once one threshold is set by hand glibc stops adapting the other, so this comes second and never alone.
        mallopt(trim_threshold, (1 << 31) - 1)
