# SPDX-License-Identifier: Apache-2.0
"""``.ci/together`` runs two sections at a time, prints each whole and in order, and fails when one fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def together(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(ROOT / ".ci/together"), *words], capture_output=True, text=True, check=False, timeout=60)


def test_two_run_at_a_time_and_are_printed_whole_and_in_order(tmp_path: Path) -> None:
    """The first one waits for what the second one writes, and the third one for the end of one of them."""
    meet = f"echo one; for i in $(seq 100); do [ -s {tmp_path}/met ] && break; sleep 0.1; done; cat {tmp_path}/met"
    done = together("first", meet, "second", f"echo here > {tmp_path}/met; echo two", "third", "echo three; echo error >&2")
    assert done.returncode == 0, done.stdout
    lines = [line.split(" (")[0] for line in done.stdout.splitlines() if line]
    assert lines == ["== first", "one", "here", "== second", "two", "== third", "three", "error"]


def test_one_that_fails_is_named_and_the_others_run(tmp_path: Path) -> None:
    done = together("bad", "echo so; exit 3", "good", f"touch {tmp_path}/ran", "worse", "false")
    assert done.returncode == 1 and (tmp_path / "ran").exists()
    assert "== bad failed with status 3" in done.stdout and done.stdout.rstrip().endswith("failed: bad worse")


@pytest.mark.parametrize("words", [(), ("name alone",)])
def test_half_a_pair_is_refused(words: tuple[str, ...]) -> None:
    assert together(*words).returncode == 2
