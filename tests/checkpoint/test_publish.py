"""A checkpoint folder is complete or not there, also when the process is killed while saving."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import time
from pathlib import Path

import pytest

from megatron_bagel.checkpoint import publish
from megatron_bagel.checkpoint.checkpoint_weights import CheckpointWeights
from megatron_bagel.checkpoint.saver import save_checkpoint
from tests.checkpoint.tiny_run import tiny_run, train_step
from tests.distributed import fork, run_ranks


def _fake(directory: Path, step: int) -> Path:
    saving = publish.begin(directory, step)
    for name in (publish.STATE_FILE, "metadata.json", ".metadata"):
        (saving / name).write_text(json.dumps({"format_version": 1, "step": step}))
    return publish.publish(saving)


def test_newest_complete_checkpoint_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert publish.latest_checkpoint(tmp_path / "nowhere") is None
    assert publish.latest_checkpoint(tmp_path) is None
    _fake(tmp_path, 9)
    newest = _fake(tmp_path, 10)
    assert (tmp_path / publish.LATEST_FILE).read_text() == "10"
    (tmp_path / "notes").mkdir()
    (tmp_path / "0000011").mkdir()
    (tmp_path / ".saving-0000012").mkdir()
    with caplog.at_level(logging.WARNING):
        assert publish.latest_checkpoint(tmp_path) == newest
    assert "0000011" in caplog.text and ".saving-0000012" in caplog.text and "notes" not in caplog.text


def test_saving_again_replaces_and_clears_what_was_torn(tmp_path: Path) -> None:
    _fake(tmp_path, 3)
    (tmp_path / ".saving-0000004").mkdir()
    _fake(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000003", publish.LATEST_FILE]


def test_a_kill_while_replacing_loses_nothing(tmp_path: Path) -> None:
    _fake(tmp_path, 2)
    _fake(tmp_path, 3).rename(tmp_path / ".replaced-0000003")  # between the two renames
    assert publish.latest_checkpoint(tmp_path) == tmp_path / ".replaced-0000003"
    publish.begin(tmp_path, 4)
    assert publish.latest_checkpoint(tmp_path) == tmp_path / "0000003"


def test_unusable_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        publish.read_state(tmp_path / "nowhere")
    made = _fake(tmp_path, 1)
    with pytest.raises(ValueError, match=r"not a complete.*newest checkpoint inside it is .*0000001"):
        publish.read_state(tmp_path)
    (made / publish.STATE_FILE).write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        publish.read_state(made)
    (made / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"lacks \.metadata"):
        publish.read_state(made)


def test_state_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers, strings, lists"):
        publish.state_text({"planner": object()})


def _save_until_killed(directory: Path) -> None:
    def work() -> None:
        trained = tiny_run()
        for step in range(1, 10_000):
            train_step(trained, step)
            save_checkpoint(directory, step, trained, {"seen": step})

    run_ranks(work, 1, parallel={})


def _kill_tree(pid: int) -> None:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    for child in children.read_text().split() if children.is_file() else []:
        _kill_tree(int(child))
    os.kill(pid, signal.SIGKILL)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the children of a process in /proc")
def test_killed_saves_leave_the_previous_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(0)
    newest = 0
    for _ in range(4):
        process = fork(_save_until_killed, tmp_path)
        first = publish.latest_checkpoint(tmp_path)
        deadline = time.monotonic() + 60
        while publish.latest_checkpoint(tmp_path) == first and time.monotonic() < deadline and newest < 3:
            time.sleep(0.05)
        time.sleep(moments.uniform(0.0, 1.5))
        _kill_tree(process.pid)
        process.join()
        found = publish.latest_checkpoint(tmp_path)
        assert found is not None
        checkpoint = CheckpointWeights(found)
        assert checkpoint.state["run"] == {"seen": checkpoint.step}
        for key in checkpoint.keys()[::20]:  # noqa: SIM118
            checkpoint.read(key)
        newest = max(newest, checkpoint.step)
