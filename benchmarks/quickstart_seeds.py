# SPDX-License-Identifier: Apache-2.0
"""The whole quickstart with several seeds: minutes, processor seconds and marks of each.

    python -m benchmarks.quickstart_seeds --folder FOLDER --seeds 0 1 2

Each seed has a folder of its own inside FOLDER, which keeps pages, pictures and models. Flags behind ``--`` go to the quickstart.
Installing is not part of the minutes, which are those of an idle machine only if nothing else runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, report
from megatron_bagel.sample_world.quickstart.folders import QuickstartFolders
from megatron_bagel.sample_world.quickstart.report import read_marks


def measure(folder: Path, seed: int, flags: Sequence[str]) -> dict[str, Any]:
    """Run the quickstart in a new folder. Raises ValueError if the folder exists, or the quickstart fails."""
    out = folder / f"seed{seed}"
    if out.exists():
        raise ValueError(f"{out} exists, and a second run would reuse its stages; remove it or name another --folder")
    command = [sys.executable, "-m", "megatron_bagel", "quickstart", str(out), "--seed", str(seed), *flags]
    print(f"== seed {seed}", file=sys.stderr, flush=True)
    before, began = os.times(), time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
    seconds, after = time.monotonic() - began, os.times()
    if done.returncode:
        raise ValueError(f"the quickstart with seed {seed} ended with status {done.returncode}; its logs are in {out}/logs")
    processor = after.children_user + after.children_system - before.children_user - before.children_system
    marks = {mark.title: round(mark.right / mark.asked, 4) for mark in read_marks(QuickstartFolders(out))}
    return {"minutes": round(seconds / 60, 2), "processor_seconds": round(processor), "right": marks}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the JSON, with ``--output`` write its record, return the figures."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.quickstart_seeds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="where each seed's output goes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="default: 0 1 2")
    parser.add_argument("--output", type=Path, help="write the record of the run (benchmarks/record.py) here")
    words = list(sys.argv[1:] if argv is None else argv)
    flags = words[words.index("--") + 1 :] if "--" in words else []
    args = parser.parse_args(words[: words.index("--")] if "--" in words else words)
    try:
        figures = {f"seed {seed}": measure(args.folder.absolute(), seed, flags) for seed in args.seeds}
    except ValueError as error:
        parser.error(str(error))
    report(figures, args.output)
    return figures


if __name__ == "__main__":
    main()
