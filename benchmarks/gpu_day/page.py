# SPDX-License-Identifier: Apache-2.0
"""The tables of a GPU's day, as Markdown, from its records.

    python -m benchmarks.gpu_day.page                     # prints the tables of benchmarks/results/
    python -m benchmarks.gpu_day.page --into docs/gpu.md  # puts them between the two marks of that page

The marks are the lines ``<!-- gpu_day -->`` and ``<!-- /gpu_day -->``. A page without them is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_day.parts import PARTS
from benchmarks.marked import put_between
from benchmarks.record import RESULTS, Record, read_record

NAMES = [part.name for part in PARTS]
MARK = "gpu_day"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def in_cell(text: str) -> str:
    """Return the beginning of a message in a form that a cell of a table can hold."""
    return " ".join(text.split())[:80].replace("|", "\\|")


def overview(records: Mapping[str, Record]) -> str:
    """Return what was run, when, on which commit, and what became of it."""
    rows = []
    for name, record in records.items():
        seconds, state = f"{record.figures.get('part_seconds', 0):.0f}", record.figures.get("state", "")
        rows.append([name, f"`{record.command}`", state, seconds, record.date[:10], record.commit[:8]])
    return table(["part", "command", "state", "seconds", "date", "commit"], rows)


def step_table(figures: Mapping[str, Any]) -> str:
    """Return the variants of a step: seconds, rate, parts, memory beside the plan's formula, share of the peak, launches."""
    rows = []
    for name, variant in figures["variants"].items():
        if "refused" in variant:
            rows.append([name, f"refused: {in_cell(variant['refused'])}", *[""] * 10])
            continue
        parts, shares, profile = variant["parts_s"], variant.get("shares_of_peak", {}), variant.get("profile", {})
        rows.append([
            name, f"{variant['step_s']:.3f}", f"{variant['step_without_laps_s']:.3f}",
            f"{variant.get('times_as_fast_as_plain', 1):.2f}", f"{variant['tokens_per_s']:,.0f}",
            f"{parts['autoencoder']:.3f}", f"{parts['decoder_forward'] + parts['backward']:.3f}",
            f"{variant['peak_mem_bytes'] / 1e9:.1f}", f"{variant['memory']['formula_bytes'] / 1e9:.1f}",
            f"{shares['whole_step']:.1%}" if shares else "",
            f"{profile['calls']:,}" if profile else "", f"{profile['idle_share']:.1%}" if "idle_share" in profile else "",
        ])  # fmt: skip
    head = [
        "step",
        "seconds",
        "without laps",
        "times plain",
        "tokens/s",
        "autoencoder s",
        "decoder and backward s",
        "peak GB",
        "plan GB",
        "of the peak rate",
        "launches",
        "idle",
    ]
    return table(head, rows)


def kernel_table(figures: Mapping[str, Any]) -> str:
    """Return the longest kernels of the plain step, or of the first that was profiled."""
    profile = next((variant["profile"] for variant in figures["variants"].values() if "profile" in variant), None)
    if profile is None:
        return ""
    rows = [[f"`{row['name'][:70]}`", f"{row['ms']:.1f}", f"{row['share']:.1%}", str(row["calls"])] for row in profile["longest"][:12]]
    idle = f"; no kernel ran in {profile['idle_share']:.1%} of the time" if "idle_share" in profile else ""
    head = f"{profile['calls']:,} {profile['of']} in {profile['ms']:.1f} ms{idle}."
    return f"{head}\n\n{table([profile['of'], 'ms', 'share', 'calls'], rows)}"


def autoencoder_table(figures: Mapping[str, Any]) -> str:
    """Return the seconds of each way to encode."""
    rows = [
        [name, f"{one['seconds']:.3f}", f"{one['times_as_fast']:.2f}", f"{one['largest_difference']:.1e}"]
        for name, one in figures["variants"].items()
    ]
    return table(["autoencoder", "seconds", "times as fast", "largest difference"], rows)


def generation_table(figures: Mapping[str, Any]) -> str:
    """Return the speed of text and pictures."""
    ways = (
        ("with the cache", "cached", "cached"),
        ("by captured graphs", "static", "captured"),
        ("reading everything again", "anew", "anew"),
    )
    rows = []
    for name, text_way, picture_way in ways:
        text, drawn = figures.get(f"text_{text_way}"), figures.get(f"picture_{picture_way}")  # a stopped run has not come to all
        rows.append([name, f"{text['tokens_per_s']:.1f}" if text else "", f"{drawn['seconds']:.2f}" if drawn else ""])
    return table(["generation", "tokens/s", "seconds per picture"], rows)


def precision_table(figures: Mapping[str, Any]) -> str:
    """Return the last losses of each precision, and how far its curve is from that of bf16."""
    rows = []
    for name, one in figures["precisions"].items():
        if "refused" in one:
            rows.append([name, f"refused: {in_cell(one['refused'])}", "", ""])
            continue
        differences = (f"{one[key]:+.4f}" if key in one else "" for key in ("mean_difference", "largest_difference"))
        rows.append([name, f"{list(one['ce'].values())[-1]:.4f}", *differences])
    return table([f"precision, {figures['steps']} steps", "last loss", "mean difference", "largest difference"], rows)


def sections(records: Mapping[str, Record]) -> Iterator[str]:
    """Yield the blocks of one machine."""
    yield overview(records)
    makers = {
        "step": (step_table, kernel_table), "step-long": (step_table,), "autoencoder": (autoencoder_table,),
        "autoencoder-bf16": (autoencoder_table,), "generation": (generation_table,),
        "precisions": (precision_table,),
    }  # fmt: skip
    for name, tables in makers.items():
        # These write as they go, and what a stopped one has measured counts.
        grows = name in records and {"variants", "context_tokens", "precisions"} & set(records[name].figures)
        if name in records and (grows or records[name].figures.get("state") == "done"):
            yield f"`{records[name].command}`"
            yield from filter(None, (make(records[name].figures) for make in tables))


def page(results: Path) -> str:
    """Return the tables of every machine that has records. Raises ValueError if there are none."""
    by_machine: dict[str, dict[str, Record]] = {}
    for path in sorted(results.glob("gpu_day-*.json")):
        record = read_record(path)
        kind = record.machine.split(";")[0]
        prefix = path.stem.removeprefix("gpu_day-")
        # The longest name first: "generation" ends "tests-generation".
        name = next(name for name in sorted(NAMES, key=len, reverse=True) if prefix.endswith(f"-{name}"))
        by_machine.setdefault(kind, {})[name] = record
    if not by_machine:
        raise ValueError(f"{results} holds no record of a GPU's day (gpu_day-*.json); run python -m benchmarks.gpu_day")
    parts = []
    for kind, records in by_machine.items():
        ordered = dict(sorted(records.items(), key=lambda pair: NAMES.index(pair[0])))
        versions = ", ".join(f"{name} {version}" for name, version in next(iter(ordered.values())).versions.items())
        parts.append("\n\n".join([f"### {kind}", versions + ".", *sections(ordered)]))
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or put them into a page."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.gpu_day.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records (default: benchmarks/results)")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="put the tables between the marks of this page")
    arguments = parser.parse_args(argv)
    text = page(arguments.results)
    if arguments.into is None:
        print(text)
        return 0
    put_between(arguments.into, MARK, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
