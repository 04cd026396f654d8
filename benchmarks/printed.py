# SPDX-License-Identifier: Apache-2.0
"""A record of a command that is no benchmark: seconds, peak memory, and lines that it printed.

    python -m benchmarks.printed --output FILE -- python tools/verify_golden.py
    python -m benchmarks.printed --output FILE --keep "step=" "^saved" -- megatron-bagel train --config train.yaml

The record's command is what follows ``--``. Processor seconds are those of all processes that the command started, and peak memory is that
of the largest one. Without ``--keep`` the last line is kept. A command that fails leaves no record.
"""

from __future__ import annotations

import argparse
import re
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, write_record

#: Lines that a record keeps at most: the first and the last ones of those that ``--keep`` finds.
_LINES = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: that of the command."""
    parser = argparse.ArgumentParser(prog="printed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="write the record of the run (benchmarks/record.py) here")
    parser.add_argument("--keep", nargs="+", default=[], metavar="REGEX", help="keep the lines that one of these finds something in")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args(argv)
    status, figures = run(arguments.command, arguments.keep)
    if status == 0:
        write_record(arguments.output, figures, as_typed(arguments.command))
    return status


def run(command: Sequence[str], keep: Sequence[str]) -> tuple[int, dict[str, Any]]:
    """Run a command and pass on what it prints. Return its exit status and its figures."""
    before, start, printed = _processor_seconds(), time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed.append(line)
    figures = {
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(_processor_seconds() - before, 2),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3),
        "printed": kept_lines(printed, keep),
    }
    return process.returncode, figures


def _processor_seconds() -> float:
    """Return what the processes that this one started, and has waited for, have used of all cores together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def kept_lines(printed: Sequence[str], keep: Sequence[str]) -> list[str]:
    """Return the lines to record, without paths of this checkout. ``…`` stands where lines of ``--keep`` are left out."""
    lines = [line.rstrip().replace(f"{ROOT}/", "") for line in printed if line.strip()]
    if not keep:
        return lines[-1:]
    kept = [line for line in lines if any(re.search(pattern, line) for pattern in keep)]
    return kept if len(kept) <= _LINES else [*kept[: _LINES // 2], "…", *kept[-_LINES // 2 :]]


def as_typed(command: Sequence[str]) -> str:
    """Return a command as one would type it in the repository, whatever interpreter this machine has."""
    return shlex.join(["python" if Path(word).name.startswith("python") else word for word in command[:1]] + list(command[1:]))


if __name__ == "__main__":
    sys.exit(main())
