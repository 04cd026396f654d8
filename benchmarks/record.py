# SPDX-License-Identifier: Apache-2.0
"""The record of a benchmark's run: one JSON file with the figures and with what one needs to measure them again.

    {"command": ..., "machine": ..., "date": ..., "commit": ..., "versions": {...}, "figures": {...}}

Every benchmark's ``--output`` writes this form. The records in ``benchmarks/results/`` are the source of tables in the documentation.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as python_platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_bagel.common.files import write_whole
from megatron_bagel.common.json_files import read_json_as

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
#: Packages whose version can change a figure.
PACKAGES = ("torch", "megatron-core", "transformer-engine", "triton", "flash-attn", "flash-attn-4", "liger-kernel", "numpy", "pillow")


@dataclass(frozen=True)
class Record:
    """One run of a benchmark.

    Attributes:
        command: The command line, without ``--output`` and its value.
        machine: GPU if there is one, processor, cores that the process may use, and memory.
        date: When the run ended, in UTC, as ISO 8601 to the second.
        commit: The commit that was checked out; " with changes" follows if files differed from it. Without git it is what the environment
            variable ``BENCHMARK_COMMIT`` says (for a copy of the files on a machine without the repository), else "unknown".
        versions: Versions of Python and of the packages in ``PACKAGES`` that are installed.
        figures: What the benchmark measured.
    """

    command: str
    machine: str
    date: str
    commit: str
    versions: dict[str, str]
    figures: dict[str, Any]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Record:
        """Return the record of a JSON object. Raises ValueError when a field is missing or unknown."""
        names = set(cls.__dataclass_fields__)
        if set(content) != names:
            raise ValueError(f"a record has the fields {', '.join(sorted(names))}, but this has {', '.join(sorted(content)) or 'none'}")
        return cls(**content)

    def to_json(self) -> str:
        """Return the text of the record's file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def record(figures: Mapping[str, Any], command: str | None = None) -> Record:
    """Return the record of a run that ends now. ``command`` defaults to this process's command line."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
    return Record(command or this_command(), machine(), date, commit(), versions(), dict(figures))


def write_record(path: Path, figures: Mapping[str, Any], command: str | None = None) -> Record:
    """Write the record of a run that ends now to ``path`` and return it. A folder that does not exist yet is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = record(figures, command)
    write_whole(path, written.to_json())
    return written


def read_record(path: Path) -> Record:
    """Return the record in a file. Raises ValueError, which names the file, when it is none."""
    return read_json_as(Record.from_dict, path, "benchmark record")


def report(figures: Mapping[str, Any], output: Path | None, indent: int | None = 2) -> None:
    """Print the figures as JSON and, with ``output``, write their record."""
    print(json.dumps(figures, indent=indent), flush=True)
    if output is not None:
        write_record(output, figures)


def this_command(argv: Sequence[str] | None = None) -> str:
    """Return a command line as one would type it in the repository, without ``--output``; default: this process's."""
    words = list(sys.argv if argv is None else argv)
    program = Path(words[0]).resolve()
    inside = program.is_relative_to(ROOT) and program.suffix == ".py"
    module = ".".join(program.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") if inside else ""
    words[:1] = ["python", "-m", module] if module else [program.name]
    kept, skip = [], False
    for word in words:
        if not skip and word not in ("--output", "--out") and not word.startswith(("--output=", "--out=")):
            kept.append(word)
        skip = word in ("--output", "--out")
    return shlex.join(kept)


def machine() -> str:
    """Return this machine in words, such as "NVIDIA H100 80GB HBM3; Intel Xeon, 16 cores, 128 GiB"."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    host = f"{_processor()}, {cores} cores, {gibibytes:.0f} GiB"
    return f"{torch.cuda.get_device_name()}; {host}" if torch.cuda.is_available() else host


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", information.read_text(encoding="utf-8")) if information.exists() else []
    return names[0].strip() if names else python_platform.processor() or python_platform.machine()


def commit() -> str:
    """Return the commit of this checkout, and whether files differ from it. Without git, see ``Record.commit``."""
    head = _git("rev-parse", "HEAD")
    if not head:
        return os.environ.get("BENCHMARK_COMMIT") or "unknown"
    return head + (" with changes" if _git("status", "--porcelain", "--untracked-files=no") else "")


def versions() -> dict[str, str]:
    """Return the versions of Python, of CUDA if torch has it, and of the installed packages of ``PACKAGES``."""
    import torch

    found = {"python": python_platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""
