# SPDX-License-Identifier: Apache-2.0
"""Compares runs that layouts.sh made: the same losses on every layout, and a fine-tuning run that goes on where another one ended.

    python examples/small_world/losses.py RUN OTHER ... [--continued TUNED]

The first run is what the others are compared with: greatest relative difference of their losses over all steps both have. Of TUNED, a run
that started from the first one's export, the held-out losses after its first step are compared with those the first run ended with.
"""

import argparse
from pathlib import Path

from megatron_bagel.sample_world.exam import read_lines

LOSSES = ("ce", "mse")


def differences(one: list[dict], other: list[dict], names: tuple[str, ...] = LOSSES) -> dict[str, tuple[float, int]]:
    """Of each loss: the greatest relative difference, and the step it is at. ValueError when the runs share no step."""
    here = {row["step"]: row for row in one}
    shared = [(row["step"], here[row["step"]], row) for row in other if row["step"] in here]
    if not shared:
        raise ValueError("the runs have no step in common")
    return {name: max((abs(b[name] - a[name]) / abs(a[name]), step) for step, a, b in shared) for name in names}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder with results/; the first is compared with")
    parser.add_argument("--continued", type=Path, metavar="TUNED", help="run that was fine-tuned from the first one's export")
    args = parser.parse_args(argv)
    first, *others = args.runs
    rows = read_lines(first / "results/metrics.jsonl")
    print(f"{first.name}: " + ", ".join(f"{name} {rows[0][name]:.4f} -> {rows[-1][name]:.4f}" for name in LOSSES) + f", {len(rows)} rows")
    for run in others:
        found = differences(rows, read_lines(run / "results/metrics.jsonl"))
        told = ", ".join(f"{name} {difference:.1e} (step {step})" for name, (difference, step) in found.items())
        print(f"{run.name} against {first.name}, greatest relative difference: {told}")
    if args.continued is not None:
        ended, goes_on = (read_lines(run / "results/validation.jsonl") for run in (first, args.continued))
        for name in LOSSES:
            before, after = ended[-1][f"model/{name}"], goes_on[0][f"model/{name}"]
            change = (after - before) / before
            print(f"{args.continued.name}: held-out {name} {before:.6f} when {first.name} ended, {after:.6f} after a step ({change:+.2%})")


if __name__ == "__main__":
    main()
