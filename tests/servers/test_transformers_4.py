# SPDX-License-Identifier: Apache-2.0
"""transformers 4.49, the release of the original's requirements, reads an exported folder as the installed release does."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.checkpoint.hf.exported import export

SCRIPT = Path(__file__).with_name("read_export.py")


def _python_with(folder: Path, *packages: str) -> Path:
    """Return the interpreter of a new environment with these packages. Skips the test if pip cannot install them."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot install {' '.join(packages)}: {done.stderr.strip().splitlines()[-1]}")
    return python


def _read(python: Path | str, folder: Path) -> dict[str, object]:
    done = subprocess.run([python, "-W", "ignore", SCRIPT, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_an_older_release_reads_the_same(goldens: Path, tmp_path: Path) -> None:
    out = export(goldens, tmp_path / "out")
    older = _read(_python_with(tmp_path / "venv", "transformers==4.49.0", "pillow", "numpy"), out)
    assert older == _read(sys.executable, out)
    assert older["tokens"] and older["end"] == 412 and older["vit"] == [224, 14, 3]
