# SPDX-License-Identifier: Apache-2.0
"""A campaign of faults: draws faults by a seed, does each to a tiny world, and says which were answered wrongly.

    python tests/faults/campaign.py --faults 200 --seed 1
    python tests/faults/campaign.py --seed 1 --only 17           one fault again, its files kept

Each fault is a process killed in some phase, a damaged file, a disk that is full or cannot be written, a small /dev/shm, a rank that stops,
a clock that jumps (where libfaketime is installed), or a second run in the same folder. It is answered well if nothing is lost, the work
continues bit for bit, the message names the file or the folder, no traceback reaches stderr, the exit status is right, and all ends within
its limit. Exit status: 0 all well, 1 some not.
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # started as a script, only this file's own folder is on the path
os.environ["OMP_NUM_THREADS"] = "1"  # commands are forked, so this process must not have threads

from tests.faults import commands, draws  # noqa: E402

if TYPE_CHECKING:
    from tests.faults.phases import World

FORK = get_context("fork")


@dataclass(frozen=True)
class Verdict:
    """What came of one fault; ``wrong`` is empty if it was answered well. ``left_out`` says why this machine cannot do it."""

    number: int
    fault: draws.Fault
    wrong: list[str]
    seconds: float
    left_out: str = ""

    def __str__(self) -> str:
        word = "out" if self.left_out else "wrong" if self.wrong else "well"
        return f"{self.number:>4}  {word:<6}{self.fault}  ({self.left_out or f'{self.seconds:.1f} s'})"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    p = argparse.ArgumentParser(prog="campaign.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--faults", type=int, default=200, metavar="N", help="how many faults are drawn (default 200)")
    p.add_argument("--seed", type=int, default=0, help="which faults (default 0)")
    p.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these faults only; their files are kept")
    p.add_argument("--kind", choices=draws.ALL_KINDS, help="of the drawn faults only those of one kind")
    p.add_argument("--minutes", type=float, help="begin no further fault after this time")
    p.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    p.add_argument("--world", type=Path, metavar="FOLDER", help="an undisturbed world of this code, to make once and use again")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="how many faults are done at a time (default 1)")
    p.add_argument("--json", type=Path, metavar="FILE", help="where the verdicts go (default: FOLDER/campaign.json)")
    return p


@dataclass(frozen=True)
class Campaign:
    """What all faults of a campaign share. None begins after ``end``, and their files are kept if ``keep``."""

    folder: Path
    world: World
    seed: int
    keep: bool
    end: float = float("inf")

    def verdict(self, number: int) -> Verdict:
        """Do one fault, and judge the answer."""
        from tests.faults.judges import NotHere, judge

        fault, scratch, begin = draws.draw(self.seed, number), self.folder / f"fault-{number}", time.monotonic()
        scratch.mkdir(parents=True)
        wrong, left_out = [], ""
        try:
            wrong = judge(fault, self.world, scratch)
        except NotHere as reason:
            left_out = str(reason)
        if not self.keep:
            shutil.rmtree(scratch)
        return Verdict(number, fault, wrong, time.monotonic() - begin, left_out)

    def verdicts(self, numbers: Sequence[int], jobs: int) -> Iterator[Verdict]:
        """Yield the verdict of each fault, as they are known. Raises RuntimeError if a process of this campaign ends early."""
        if jobs < 2:
            yield from self._in_turn(numbers)
            return
        readers, processes = [], []
        for job in range(jobs):
            reader, writer = FORK.Pipe(duplex=False)
            processes.append(FORK.Process(target=self._work, args=(numbers[job::jobs], writer)))
            processes[-1].start()
            writer.close()
            readers.append(reader)
        while readers:
            for reader in wait(readers):
                try:
                    yield reader.recv()
                except EOFError:
                    readers.remove(reader)
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a process of the campaign ended with {process.exitcode}")

    def _in_turn(self, numbers: Sequence[int]) -> Iterator[Verdict]:
        for number in numbers:
            if time.monotonic() < self.end:
                yield self.verdict(number)

    def _work(self, numbers: Sequence[int], writer: Connection) -> None:
        for verdict in self._in_turn(numbers):
            writer.send(verdict)


def table(verdicts: Sequence[Verdict]) -> str:
    """Return one line for each kind of fault: how many there were, how many were answered wrongly, and how many could not be done."""
    counts = collections.Counter(verdict.fault.kind for verdict in verdicts)
    wrong = collections.Counter(verdict.fault.kind for verdict in verdicts if verdict.wrong)
    left_out = collections.Counter(verdict.fault.kind for verdict in verdicts if verdict.left_out)
    lines = [f"{kind:<12}{counts[kind]:>8}{wrong[kind]:>8}{left_out[kind]:>10}" for kind in draws.ALL_KINDS if counts[kind]]
    total = f"{'all':<12}{len(verdicts):>8}{wrong.total():>8}{left_out.total():>10}"
    return "\n".join([f"{'':<12}{'faults':>8}{'wrong':>8}{'left out':>10}", *lines, total])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a campaign. Returns the exit status."""
    arguments = parser().parse_args(argv)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    shutil.rmtree(folder, ignore_errors=True)
    wanted, keep = arguments.only or range(arguments.faults), bool(arguments.only)
    numbers = [number for number in wanted if arguments.kind in (None, draws.draw(arguments.seed, number).kind)]
    end = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    commands.preload()
    from tests.faults.phases import open_world

    campaign = Campaign(folder, open_world(arguments.world or folder / "world"), arguments.seed, keep, end)
    verdicts: list[Verdict] = []
    for verdict in campaign.verdicts(numbers, arguments.jobs):
        verdicts.append(verdict)
        print(verdict, flush=True)
        for text in verdict.wrong:
            print(f"        {text}", flush=True)
    path = arguments.json or folder / "campaign.json"
    verdicts.sort(key=lambda verdict: verdict.number)
    path.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=1))
    print(f"\n{table(verdicts)}\nseed {arguments.seed}; verdicts: {path}")
    return 1 if any(verdict.wrong for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
