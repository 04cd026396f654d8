# SPDX-License-Identifier: Apache-2.0
"""Everything that wants one GPU, in order of worth, each part in a process of its own and with a limit of its own.

    python -m benchmarks.gpu_day                       # 25 minutes
    python -m benchmarks.gpu_day --minutes 10 --only goldens step
    python -m benchmarks.gpu_day --list
    CUDA_VISIBLE_DEVICES= python -m benchmarks.gpu_day --tiny --results tiny_day

Every part writes a record into ``benchmarks/results/`` (or ``--results``) as soon as it has something, so a machine that is taken away
leaves what was measured. The command may be started again, also on another machine with the same kind of GPU that was given the folder of
records: parts that are done are left out (``--again`` repeats them), the variants of a step go on where they stopped, and other parts begin
again. A part is not begun when less than half of its time is left, and is left out if a package is missing. It needs no network.
Without git, set BENCHMARK_COMMIT to what the records shall name. ``python -m benchmarks.gpu_day.page`` makes the tables of a page.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # runs as a folder too, without installing the benchmarks

from benchmarks.gpu_day.parts import PARTS, TINY  # noqa: E402
from benchmarks.gpu_day.runner import Day  # noqa: E402
from benchmarks.record import RESULTS  # noqa: E402


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25.0, help="time for all parts together (default 25)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU: shows that every part runs")
    parser.add_argument("--only", nargs="+", metavar="PART", help="these parts alone, in the order of the list")
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: benchmarks/results)")
    parser.add_argument("--list", action="store_true", help="print the parts with their limits and end")
    arguments = parser.parse_args(argv)
    names = [part.name for part in PARTS]
    if unknown := sorted(set(arguments.only or []) - set(names)):
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(names)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts. The exit status is 1 if one failed, was stopped or had no time, else 0."""
    arguments = parse_arguments(argv)
    parts = [part for part in (TINY if arguments.tiny else PARTS) if not arguments.only or part.name in arguments.only]
    if arguments.list:
        for part in parts:
            print(f"{part.name:22} {part.seconds:5.0f} s  {' '.join(part.command)}")
        return 0
    # A part has a process group of its own, so it would outlive a program that is ended without unwinding.
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        day = Day(arguments.results.absolute(), arguments.minutes * 60, arguments.again)
        states = {part.name: day.run(part) for part in parts}
    finally:
        signal.signal(signal.SIGTERM, earlier)
    width = max(map(len, states))
    print("\n".join(f"{name:{width}}  {state}" for name, state in states.items()))
    return 0 if all(state in ("done", "done before", "left out") for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
