# SPDX-License-Identifier: Apache-2.0
"""Commands in the documentation, parsed by the programs themselves: each starts, reads its words with its own parser, and is stopped.

Nothing of a command runs beyond its parser, so commands that need a GPU or somebody's data are held to the same rule.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
STARTS = re.compile(r"^([A-Za-z_]+=\S+ )*(python|bash|torchrun|sbatch|kubectl|docker|megatron-bagel) ")
OWN_PACKAGES = ("megatron_bagel", "benchmarks")


@dataclass(frozen=True)
class Command:
    """A command line of a page, continuation lines joined; ``line`` is where it starts, ``gpu`` whether its block is marked ```bash gpu:
    it needs GPUs, or a cluster, and nothing here runs it."""

    page: Path
    line: int
    text: str
    gpu: bool = False

    @property
    def name(self) -> str:
        """For the test report."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def abridged(self) -> bool:
        """Whether it leaves something out for the reader to fill in, and so cannot run as it stands."""
        return "..." in self.text or "…" in self.text

    @property
    def words(self) -> list[str]:
        """Words as a shell would pass them: comments and ``...`` gone, every variable replaced by a number that any flag takes."""
        text = re.sub(r"\$\{?\w+\}?", "1", self.text)
        words = [word for word in shlex.split(text, comments=True) if word not in ("...", "…")]
        return list(itertools.dropwhile(lambda word: re.match(r"^[A-Za-z_]+=", word), words))


class Parsed(Exception):
    """Raised in place of running a program, once it has read its words. ``unknown`` are words that no flag took."""

    def __init__(self, parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
        super().__init__("parsed")
        self.parser, self.unknown = parser, list(unknown)


def code_lines(page: Path) -> Iterator[tuple[int, str, bool]]:
    """(line number, text, marked as needing a GPU) inside ```bash blocks and indented blocks of a page."""
    fence: str | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        mark = re.match(r"^\s*```(.*)", line)
        if mark:
            fence = None if fence is not None else mark.group(1).strip()
        elif fence in ("bash", "bash gpu") or (fence is None and line.startswith("    ")):
            yield number, line.strip(), fence == "bash gpu"


def commands() -> list[Command]:
    """Every command of every page that begins with one of the launchers, or with variables set for it."""
    found: list[Command] = []
    for page in PAGES:
        unfinished: tuple[int, str] | None = None
        for number, line, gpu in code_lines(page):
            start, text = (unfinished[0], f"{unfinished[1]} {line}") if unfinished else (number, line)
            if text.endswith("\\"):
                unfinished = start, text[:-1].rstrip()
                continue
            unfinished = None
            if STARTS.match(text):
                found.append(Command(page, start, text, gpu))
    return found


def check(command: Command) -> None:
    """Let the command's program read its words. Of scripts, manifests and other projects' modules only their existence is checked.

    Raises SystemExit, with the parser's own message on stderr, for words that the program refuses; ValueError for words that no flag
    takes, and for a program that does not exist.
    """
    launcher, *words = command.words
    if launcher in ("bash", "sbatch", "kubectl", "docker"):
        for word in words[:1] if launcher == "bash" else [word for word in words if word.startswith("examples/")]:
            _need_file(word)
    elif launcher == "megatron-bagel":
        _refuse_unknown(_run("megatron_bagel", words, module=True))
    elif launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = get_args_parser().parse_args(words)
        _refuse_unknown(_run(launch.training_script, list(launch.training_script_args), module=launch.module))
    elif words[0] != "-m":
        _refuse_unknown(_run(words[0], words[1:], module=False))
    elif words[1].split(".")[0] in OWN_PACKAGES:
        _refuse_unknown(_run(words[1], words[2:], module=True))
    elif importlib.util.find_spec(words[1]) is None:
        raise ValueError(f"there is no module {words[1]}")


def flags_of(programs: Sequence[str]) -> set[str]:
    """Flags of the programs (paths or modules, and the words of a command after them), dashes written as underscores."""
    found: set[str] = set()
    for program in programs:
        name, *words = program.split()
        try:
            _run(name, words, module=not name.endswith(".py"), before_reading=True)
        except Parsed as stop:
            found |= {option.replace("-", "_") for option in stop.parser._option_string_actions}
    return found


def _run(program: str, words: list[str], module: bool, before_reading: bool = False) -> Parsed:
    """Start a program and stop it when it has read ``words`` (or, with ``before_reading``, when it is about to)."""
    original = argparse.ArgumentParser.parse_known_args

    def read(self: argparse.ArgumentParser, args=None, namespace=None):
        if before_reading:
            raise Parsed(self, ())
        raise Parsed(self, original(self, args, namespace)[1])

    if not module:
        _need_file(program)
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", read), mock.patch.object(sys, "argv", [program, *words]):
        try:
            if module:
                runpy.run_module(program, run_name="__main__", alter_sys=False)
            else:
                runpy.run_path(str(ROOT / program), run_name="__main__")
        except Parsed as stop:
            if before_reading:
                raise
            return stop
    raise ValueError(f"{program} ended before it read its command line")


def _refuse_unknown(parsed: Parsed) -> None:
    if parsed.unknown:
        raise ValueError(f"no flag takes {' '.join(parsed.unknown)}")


def _need_file(path: str) -> None:
    if not (ROOT / path).is_file():
        raise ValueError(f"there is no file {path}")
