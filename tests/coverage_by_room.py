# SPDX-License-Identifier: Apache-2.0
"""Prints how much of each room of the package the last ``bash tests/run.sh --cov`` ran. A figure to look at, not a bound."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePath

PACKAGE = "megatron_bagel"


def lines_by_room(files: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Sum the lines of source files over the package's folders.

    Args:
        files: (lines that ran, lines that can run) of each file, by its path from the repository root.

    Returns:
        The same pair of each room in alphabetical order. Files directly in the package count as ``megatron_bagel``.
    """
    ran: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for name, (covered, statements) in files.items():
        folders = PurePath(name).parent.parts
        room = folders[1] if len(folders) > 1 else PACKAGE
        ran[room] += covered
        total[room] += statements
    return {room: (ran[room], total[room]) for room in sorted(total)}


def table(rooms: Mapping[str, tuple[int, int]]) -> str:
    """Return one line per room and a total: percentage, then lines that ran of those that can."""
    total = tuple(map(sum, zip(*rooms.values(), strict=True)))
    rows = [
        f"{room:<16} {ran / max(lines, 1):6.1%}  {ran:>6} of {lines:>6} lines" for room, (ran, lines) in [*rooms.items(), ("total", total)]
    ]
    return "\n".join(rows)


def main() -> None:
    """Print the table of the data file in the current folder."""
    import coverage

    measured = coverage.Coverage()
    measured.load()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        measured.json_report(outfile=os.fspath(report))
        files = json.loads(report.read_text(encoding="utf-8"))["files"]
    summaries = {name: file["summary"] for name, file in files.items()}
    print(table(lines_by_room({name: (lines["covered_lines"], lines["num_statements"]) for name, lines in summaries.items()})))


if __name__ == "__main__":
    main()
