# SPDX-License-Identifier: Apache-2.0
"""Says where two runs first differ, and by how much: metrics, weights, checkpoints, exported model folders, or whole recordings.

    python tools/compare_runs.py before after --bitwise            recordings of record_runs.py
    python tools/compare_runs.py results_a results_b               two results folders, within 1e-5 relative
    python tools/compare_runs.py a/metrics.jsonl b/metrics.jsonl
    python tools/compare_runs.py a/checkpoints/0000020 b/checkpoints/0000020
    python tools/compare_runs.py exported_a exported_b

A and B are two of a kind: folders (everything below them that can be compared is), metrics files, training checkpoints, model folders,
weight files, index folders. Differences of a tensor are relative to its largest value. One pair of tensors is in memory at a time.
Exit status: 0 equal, 1 different, 2 something cannot be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script, only this file's own folder is on the path

from tools.compare_parts import discover, kind_of  # noqa: E402
from tools.compare_values import Rule, Tally  # noqa: E402

DEFAULT_TOLERANCE = 1e-5


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(prog="compare_runs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("a", type=Path, metavar="A", help="one side")
    p.add_argument("b", type=Path, metavar="B", help="the other")
    accepted = p.add_mutually_exclusive_group()
    accepted.add_argument("--bitwise", action="store_true", help="any difference of bits counts")
    accepted.add_argument(
        "--tolerance", type=_tolerance, default=DEFAULT_TOLERANCE, metavar="R",
        help="relative difference of floating-point numbers that still counts as equal (default: %(default)g)",
    )  # fmt: skip
    return p


def compare(a: Path, b: Path, rule: Rule) -> Iterator[Tally]:
    """Yield the comparison of every part that both sides hold, and last of the parts that only one side holds."""
    from tools.compare_files import compare_part

    left, right = discover(a), discover(b)
    if ("" in left) != ("" in right):
        kinds = [f"{path} is a {kind_of(path) or 'folder of several parts'}" for path in (a, b)]
        raise ValueError(f"{' and '.join(kinds)}: compare two things of one kind")
    for name in left:
        if name in right:
            yield compare_part(name or a.name, left[name], right[name], rule)
    one_sided = Tally("parts on one side", "parts")
    one_sided.note_one_sided(left, right)
    if not one_sided.equal:
        yield one_sided


def table(tallies: Sequence[Tally]) -> str:
    """Return one line for each run or group of parts: how many parts, how much was compared, and how much differs."""
    groups: dict[str, list[Tally]] = {}
    for tally in tallies:
        groups.setdefault(tally.name.split("/", 1)[0], []).append(tally)
    rows = [("", "parts", "compared", "different", "largest relative")]
    for name, group in groups.items():
        different = sum(tally.different + sum(map(len, tally.only.values())) for tally in group)
        largest = max(tally.largest for tally in group)
        rows.append((name, str(len(group)), str(sum(tally.compared for tally in group)), str(different), f"{largest:.3g}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line) for line in lines)


def left_out(rule: Rule) -> str:
    """Return one line about what the comparison does not look at."""
    from tools.compare_bytes import PATH_KEYS
    from tools.compare_files import TIMING_PREFIXES, TIMINGS

    measured = ", ".join([*TIMINGS, *(f"{prefix}*" for prefix in TIMING_PREFIXES)])
    rounding = "" if rule.bitwise else "key biases of the vision tower, whose true gradient is zero; "
    return (
        f"Left out: {rounding}what is measured ({measured}); of checkpoints versions, number of ranks and flags; "
        f"of model folders the card (README.md); of an index paths and what follows from them ({', '.join(sorted(PATH_KEYS))})."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare. Exit status: 0 equal, 1 different, 2 bad input."""
    arguments = parser().parse_args(argv)
    rule = Rule(arguments.bitwise, arguments.tolerance)
    tallies: list[Tally] = []
    try:
        for tally in compare(arguments.a, arguments.b, rule):
            print(tally.sentence(rule), flush=True)
            tallies.append(tally)
    except (ValueError, OSError) as error:
        print(f"compare_runs: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(tallies)}\n{left_out(rule)}")
    different = [tally.name for tally in tallies if not tally.equal]
    verdict = f"different: {', '.join(different)}" if different else f"equal {rule}"
    print(f"A ({arguments.a}) and B ({arguments.b}) are {verdict}")
    return 1 if different else 0


def _tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is no relative tolerance; give a number from 0 to below 1, such as 1e-5")
    return value


if __name__ == "__main__":
    sys.exit(main())
