# SPDX-License-Identifier: Apache-2.0
"""A campaign of faults: draws faults by a seed, does each to a tiny world, and says which were answered wrongly.

    python tests/faults/campaign.py --faults 200 --seed 1
    python tests/faults/campaign.py --seed 1 --only 17           one fault again, its files kept

Each fault is a process killed in some phase, a damaged file, a disk that is full or cannot be written, a rank that stops, or a second run
in the same folder. It is answered well if nothing is lost, the work continues bit for bit, the message names the file or the folder, no
traceback reaches stderr, the exit status is right, and all ends within its limit. Exit status: 0 all well, 1 some not.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script, only this file's own folder is on the path
os.environ["OMP_NUM_THREADS"] = "1"  # commands are forked, so this process must not have threads

from tests.faults import commands, draws  # noqa: E402


@dataclass(frozen=True)
class Verdict:
    """What came of one fault; ``wrong`` is empty if it was answered well."""

    number: int
    fault: draws.Fault
    wrong: list[str]
    seconds: float


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faults", type=int, default=200, metavar="N", help="how many faults are drawn (default 200)")
    p.add_argument("--seed", type=int, default=0, help="which faults (default 0)")
    p.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these faults only; their files are kept")
    p.add_argument("--kind", choices=list(draws.KINDS), help="of the drawn faults only those of one kind")
    p.add_argument("--minutes", type=float, help="begin no further fault after this time")
    p.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the verdicts go (default: FOLDER/campaign.json)")
    return p


def run(folder: Path, seed: int, numbers: Iterable[int], keep: bool = False, kind: str | None = None) -> Iterator[Verdict]:
    """Yield the verdict of each fault. The undisturbed world is made first, below ``folder``."""
    commands.preload()
    from tests.faults.judges import judge
    from tests.faults.phases import make_world

    world = make_world(folder / "world")
    for number in numbers:
        fault = draws.draw(seed, number)
        if kind not in (None, fault.kind):
            continue
        scratch, begin = folder / f"fault-{number}", time.monotonic()
        scratch.mkdir()
        wrong = judge(fault, world, scratch)
        yield Verdict(number, fault, wrong, time.monotonic() - begin)
        if not keep:
            shutil.rmtree(scratch)


def table(verdicts: Sequence[Verdict]) -> str:
    """Return one line for each kind of fault: how many there were, and how many were answered wrongly."""
    counts = collections.Counter(verdict.fault.kind for verdict in verdicts)
    wrong = collections.Counter(verdict.fault.kind for verdict in verdicts if verdict.wrong)
    lines = [f"{kind:<12}{counts[kind]:>8}{wrong[kind]:>8}" for kind in draws.KINDS if counts[kind]]
    return "\n".join([f"{'':<12}{'faults':>8}{'wrong':>8}", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign. Returns the exit status."""
    arguments = parser().parse_args(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    shutil.rmtree(folder, ignore_errors=True)
    numbers, keep = arguments.only or range(arguments.faults), bool(arguments.only)
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    verdicts: list[Verdict] = []
    for verdict in run(folder, arguments.seed, numbers, keep, arguments.kind):
        verdicts.append(verdict)
        print(f"{verdict.number:>4}  {'wrong' if verdict.wrong else 'well ':<6}{verdict.fault}  ({verdict.seconds:.1f} s)", flush=True)
        for text in verdict.wrong:
            print(f"        {text}", flush=True)
        if time.monotonic() > end:
            break
    path = arguments.json or folder / "campaign.json"
    path.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    print(f"\n{table(verdicts)}\nseed {arguments.seed}; verdicts: {path}")
    return 1 if any(verdict.wrong for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
