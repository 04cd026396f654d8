# SPDX-License-Identifier: Apache-2.0
"""Commands run side by side; the first that fails stops the others and is reported with the end of its output."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from megatron_bagel.sample_world.quickstart.commands import CommandFailedError, launched_command, module_command, run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_goes_to_the_log_and_the_watcher_sees_the_end(tmp_path: Path) -> None:
    seen = []
    log = tmp_path / "logs/stage.txt"
    # One call for each line: print may write a line and its end apart, and the other process between them.
    write = "os.write(1, (os.environ['OMP_NUM_THREADS'] + chr(10)).encode())"
    first = python(f"import os, pathlib; {write}; pathlib.Path({str(tmp_path / 'done')!r}).touch()")
    second = python("import os; os.write(1, b'two' + bytes([10]))")
    run([first, second], log, threads=3, watch=lambda: seen.append((tmp_path / "done").exists()))
    assert sorted(log.read_text().split()) == ["3", "two"]
    assert seen[-1], "the watcher is called after the end too"


def test_a_failure_names_the_command_and_ends_the_others(tmp_path: Path) -> None:
    endless = python(f"import time, pathlib\nwhile True:\n    time.sleep(0.05)\n    pathlib.Path({str(tmp_path / 'alive')!r}).touch()")
    with pytest.raises(CommandFailedError, match=r"(?s)sys\.exit.*ended with status 3.*last words"):
        run([endless, python("import sys; print('last words', flush=True); sys.exit(3)")], tmp_path / "log.txt")
    (tmp_path / "alive").unlink(missing_ok=True)
    time.sleep(0.3)
    assert not (tmp_path / "alive").exists()


def test_command_lines() -> None:
    assert module_command("data", "build", Path("x")) == [sys.executable, "-m", "megatron_bagel", "data", "build", "x"]
    assert launched_command(2, "train")[-5:] == ["--nproc_per_node", "2", "-m", "megatron_bagel", "train"]
