# SPDX-License-Identifier: Apache-2.0
"""The page of recorded runs, made from the records in ``benchmarks/results``.

python -m benchmarks.layout --output benchmarks/results/layout.json      adds a record
python -m benchmarks.printed --output benchmarks/results/verify_golden.json -- python tools/verify_golden.py
python -m benchmarks.recorded_page                                       writes docs/recorded.md again
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, ROOT, Record, read_record

PAGE = ROOT / "docs" / "recorded.md"
_PACKAGES = ("torch", "megatron-core", "transformer-engine")
#: Program -> the figures that its row shows first, as patterns of their names; the others follow while there is room.
_FIRST = {
    "benchmarks.build_beside": (" ratio",),
    "benchmarks.checkpoint": ("speed_of", "peak", "wall_s"),
    "benchmarks.data": ("fill", "imbalance", "per_s", "seconds"),
    "benchmarks.encoder_memory": ("peak_megabytes", "difference"),
    "benchmarks.generate": ("tokens_per_s", "seconds", "largest_difference"),
    "benchmarks.layout": ("layout_seconds", "area_imbalance", "block_mask seconds"),
    "benchmarks.new_colour": ("trained_share", "training_minutes", "after"),
    "benchmarks.parallel_step": ("loss", "step", "peak"),
    "benchmarks.quickstart_seeds": ("minutes", "colour", "rest kept"),
    "benchmarks.train_step": ("step_s", "tokens_per_s", "peak_mem_bytes", "achieved_gflops", "share_of_matmul_rate", "loss"),
}
#: Figures of a row at most; the file has all.
_SHOWN = 12
_HEAD = """# Recorded runs

Every row is a command, the machine, the date and the commit on which it ran, and what it printed.
`python -m benchmarks.recorded_page` makes this page from the files in
[benchmarks/results](../benchmarks/results/README.md), which hold every figure.

Rows of a processor without a GPU come from a virtual machine of two cores on which other work often ran at the same time. Their times
say that the command works and what it prints, not how fast the code is. [GPU](gpu.md) has what was measured on a GPU.

| command, machine, date, commit, versions | what it printed |
| --- | --- |
"""


def page(results: Path = RESULTS) -> str:
    """Return the page. Raises ValueError, which names the file, for one that is no record."""
    records = [(path.relative_to(results).as_posix(), read_record(path)) for path in sorted(results.rglob("*.json"))]
    return _HEAD + "".join(row(name, record) for name, record in sorted(records, key=lambda entry: (entry[1].command, entry[1].date)))


def row(name: str, record: Record) -> str:
    """Return the row of a record in the file ``name``."""
    versions = ", ".join(f"{package} {record.versions[package]}" for package in _PACKAGES if package in record.versions)
    numbers = in_order(list(figures(record.figures)), record.command)
    shown = "; ".join(f"{label} {value:.4g}" for label, value in numbers[:_SHOWN])
    more = f"; {len(numbers) - _SHOWN} more in `{name}`" if len(numbers) > _SHOWN else ""
    commit, _, changes = record.commit.partition(" ")
    printed = "".join(f"<br>`{line}`" for line in record.figures.get("printed", []))
    run = f"{record.machine}<br>{record.date[:10]}, `{commit[:7]}`{f' {changes}' if changes else ''}, {versions}"
    cells = (f"`{record.command}`<br>{run}", shown + more + printed)
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"


def in_order(numbers: list[tuple[str, float]], command: str) -> list[tuple[str, float]]:
    """Return named figures with those first that ``_FIRST`` names for the command's program."""
    patterns = next((first for program, first in _FIRST.items() if f" {program}" in command), ())
    rank = {label: next((n for n, pattern in enumerate(patterns) if pattern in label), len(patterns)) for label, _ in numbers}
    return sorted(numbers, key=lambda entry: rank[entry[0]])


def figures(value: Any, label: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of nested figures, with their names joined by spaces."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from figures(entry, f"{label} {name}".strip())
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from figures(entry, f"{label} {number}".strip())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield label, float(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
