# SPDX-License-Identifier: Apache-2.0
"""What pages say that commands print: the ```text block right below a ```bash block.

A line of such a block is one that the commands print; ``…`` stands for anything, and a line of it for any lines. Numbers may differ: they
depend on the machine, and tests run smaller sizes.

    python -m tests.docs.expected_output README.md "bash examples/quickstart.sh" printed.txt

compares one block with what a file holds, for commands that only CI runs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.docs.commands import ROOT

#: Pages whose every command block has its output beside it.
PAGES = (ROOT / "README.md", ROOT / "docs" / "getting_started.md")
_FENCES = re.compile(r"^```bash\n(?P<commands>.*?)^```\n(?:\n?```text\n(?P<expected>.*?)^```\n)?", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d.,:]*")


@dataclass(frozen=True)
class Block:
    """A block of commands; ``first`` and ``last`` are the lines of the page between which they stand, ``expected`` what they print."""

    page: Path
    first: int
    last: int
    commands: str
    expected: tuple[str, ...]

    @property
    def name(self) -> str:
        """For the test report."""
        return f"{self.page.relative_to(ROOT)}:{self.first}"


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of commands of a page that are not marked as needing a GPU."""
    text = page.read_text(encoding="utf-8")
    for match in _FENCES.finditer(text):
        first = text.count("\n", 0, match.start()) + 1
        last = first + match["commands"].count("\n") + 1
        yield Block(page, first, last, match["commands"], tuple((match["expected"] or "").splitlines()))


def missing(expected: Sequence[str], printed: str) -> list[str]:
    """Return the expected lines that were not printed, in their order; numbers may differ.

    Progress bars, which write a line over and over, count by what they wrote last.
    """
    lines = iter([_comparable(line.rsplit("\r", 1)[-1]) for line in printed.splitlines()])
    absent = []
    for line in expected:
        pattern = re.compile(".*".join(re.escape(_comparable(part)) for part in line.split("…")))
        if line.strip() == "…":
            continue
        if not any(pattern.fullmatch(candidate) for candidate in lines):
            absent.append(line)
            break
    return absent


def _comparable(line: str) -> str:
    return re.sub(r"\s+", " ", _NUMBER.sub("#", line)).rstrip()


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 printed as the page says, 1 not, 2 the page has no such block."""
    page, command, file = arguments
    found = [block for block in blocks(ROOT / page) if command in block.commands]
    if len(found) != 1 or not found[0].expected:
        print(f"{page} has {len(found)} blocks with the command {command!r}, and one with its output is expected", file=sys.stderr)
        return 2
    absent = missing(found[0].expected, Path(file).read_text(encoding="utf-8", errors="replace"))
    if absent:
        print(f"{found[0].name} says that {command!r} prints a line that it did not print:\n{absent[0]}", file=sys.stderr)
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
