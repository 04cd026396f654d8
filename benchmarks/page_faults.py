# SPDX-License-Identifier: Apache-2.0
"""What the memory settings of CPU runs save: page faults and time of large temporaries, as JSON.

    python -m benchmarks.page_faults

Each combination of the two settings runs in a fresh process, because torch and glibc read them once:
``huge_pages`` is torch's THP_MEM_ALLOC_ENABLE, ``keep_freed`` the malloc thresholds that ``platform.install`` sets.

How to read it: 24 MiB are 6,144 small pages, or 12 huge ones and up to a thousand small ones at both ends. With ``keep_freed`` a repeated
temporary costs nothing, except that a small block allocated in between may take the place of the last one. The temporary then moves once
and faults in new memory: a few hundred faults in all, or none, by chance. Blocks of 32 MiB and more always come from the kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import report

MIB = 1 << 20
MEASURE = "--in-this-process"


def measure(mebibytes: int, repeats: int) -> dict[str, Any]:
    """Faults and seconds of the first temporary of this size, and of each one after it."""
    import resource

    import torch

    def allocate() -> tuple[int, float]:
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        torch.ones(mebibytes * MIB // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults, time.perf_counter() - start

    first, *rest = [allocate() for _ in range(repeats + 1)]
    return {
        "first_faults": first[0],
        "later_faults": [faults for faults, _ in rest],
        "first_ms": first[1] * 1e3,
        "later_ms": statistics.median(seconds for _, seconds in rest) * 1e3,
    }


def measure_here(repeats: int) -> dict[str, Any]:
    """Measurements of this process, under the settings its environment asks for."""
    import torch

    from megatron_bagel import platform

    platform.install()
    torch.set_num_threads(1)
    return {f"{size} MiB": measure(size, repeats) for size in (24, 256)}


def measure_settings(huge_pages: bool, keep_freed: bool, repeats: int) -> dict[str, Any]:
    """Measurements of a fresh process with these settings."""
    settings = {"THP_MEM_ALLOC_ENABLE": str(int(huge_pages))}
    if not keep_freed:
        settings["GLIBC_TUNABLES"] = ""  # platform.install leaves malloc alone where this is set
    names = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")
    environment = {name: value for name, value in os.environ.items() if name not in names} | settings
    command = [sys.executable, "-m", "benchmarks.page_faults", MEASURE, "--repeats", str(repeats)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print one JSON object, and return it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="temporaries after the first (default 20)")
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    parser.add_argument(MEASURE, action="store_true", help="measure the settings of this process alone")
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.in_this_process:
        result = measure_here(arguments.repeats)
    else:
        result = {
            f"huge_pages={'on' if huge_pages else 'off'} keep_freed={'on' if keep_freed else 'off'}": measure_settings(
                huge_pages, keep_freed, arguments.repeats
            )
            for huge_pages in (False, True)
            for keep_freed in (False, True)
        }
    report(result, arguments.output, indent=None if arguments.in_this_process else 2)
    return result


if __name__ == "__main__":
    main()
