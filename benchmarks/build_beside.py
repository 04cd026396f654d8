# SPDX-License-Identifier: Apache-2.0
"""The build of another checkout beside this one's: the same sources, in turn, by processor time.

    git worktree add ../before COMMIT
    python -m benchmarks.build_beside ../before --rows 3000 --repeats 5

Each round starts a process per checkout and changes their order. A process builds a few rows first, then an index of each kind of source,
all in one process. Times are processor seconds, which other work on the machine changes less than wall time. ``ratio`` is this checkout's
rows per processor second over the other's: the median over rounds, each of which compares neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs as a file too, without installing the benchmarks

from benchmarks.record import ROOT, report  # noqa: E402
from megatron_bagel.cli.data.sample import main as make_sample_data  # noqa: E402

#: What a process of either checkout runs; it uses only names that both have.
_BUILDS = """
import json, sys, time
from pathlib import Path
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.sources.dataset_config import load_groups

small, sources, output = map(Path, sys.argv[1:])
options = BuildOptions(progress=False)
build_index(load_groups(small / "dataset.yaml"), small / "tokenizer", output / "small", options)
seconds = {}
for group in load_groups(sources / "dataset.yaml"):
    before = time.process_time()
    build_index([group], sources / "tokenizer", output / group.name, options)
    seconds[group.name] = time.process_time() - before
print(json.dumps(seconds))
"""


def make_sources(folder: Path, rows: int) -> None:
    """Write ``rows`` rows of each kind: T2I and editing in parquet, conversations and plain text in jsonl; pictures of 64 pixels."""
    counts = [word for kind in ("t2i", "edit", "vlm", "text") for word in (f"--{kind}", str(rows))]
    make_sample_data([str(folder), *counts])


def processor_seconds(checkout: Path, small: Path, sources: Path) -> dict[str, float]:
    """Return the processor seconds of each group's build by the code of a checkout."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-c", _BUILDS, str(small), str(sources), output]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "TOKENIZERS_PARALLELISM": "false"}
        ended = subprocess.run(command, env=environment, cwd=output, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise ValueError(f"the build of {checkout} failed: {ended.stderr.strip()[-2000:]}")
    times: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return times


def measure(other: Path, rows: int, repeats: int) -> dict[str, object]:
    """Rows per processor second of both checkouts for each group, and the ratio of this one to the other."""
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        small, sources = Path(folder, "small"), Path(folder, "sources")
        make_sources(small, 8)
        make_sources(sources, rows)
        for number in range(repeats):
            order = (ROOT, other) if number % 2 else (other, ROOT)
            times = {checkout: processor_seconds(checkout, small, sources) for checkout in order}
            rounds.append((times[ROOT], times[other]))
    return {"rows": rows, "repeats": repeats, **{group: compared(group, rows, rounds) for group in rounds[0][0]}}


def compared(group: str, rows: int, rounds: Sequence[tuple[dict[str, float], dict[str, float]]]) -> dict[str, float]:
    """Return the figures of a group from the processor seconds of each round: this checkout's, and the other's."""
    ours, others = ([times[group] for times in side] for side in zip(*rounds, strict=True))
    ratios = [other / our for our, other in zip(ours, others, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "lowest_ratio": min(ratios),
        "highest_ratio": max(ratios),
        "rows_per_cpu_second": rows / statistics.median(ours),
        "other_rows_per_cpu_second": rows / statistics.median(others),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="root of the other checkout of this repository")
    parser.add_argument("--rows", type=int, default=3000, help="of each kind of source")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write a record of this run (benchmarks/record.py) here")
    arguments = parser.parse_args(argv)
    if not (arguments.checkout / "megatron_bagel").is_dir():
        parser.error(f"{arguments.checkout} is no checkout of this repository: it has no folder megatron_bagel")
    report(measure(arguments.checkout.resolve(), arguments.rows, arguments.repeats), arguments.output)


if __name__ == "__main__":
    main()
