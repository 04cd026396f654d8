# SPDX-License-Identifier: Apache-2.0
"""The nightly workflow runs every slow test: each folder of tests is in its list."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent.parent
#: Without tests of their own, or with those of a GPU.
LEFT_OUT = {"goldens", "gpu"}


def test_every_folder_of_tests_runs_at_night() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/nightly.yml").read_text(encoding="utf-8"))
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and any(path.rglob("test_*.py"))}
    assert set(workflow["jobs"]["slow"]["strategy"]["matrix"]["folder"]) == folders - LEFT_OUT
