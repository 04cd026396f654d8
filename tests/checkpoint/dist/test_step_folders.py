# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder is complete or not there; which folder is loaded, which may go. Kills and damage are in test_faults.py."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron_bagel.checkpoint.dist import step_folders


def _fake(directory: Path, step: int) -> Path:
    saving = step_folders.begin(directory, step)
    for name in (step_folders.STATE_FILE, "metadata.json", ".metadata"):
        (saving / name).write_text(json.dumps({"format_version": 1, "step": step}))
    return step_folders.publish(saving)


def test_newest_complete_checkpoint_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert step_folders.latest_checkpoint(tmp_path / "nowhere") is None
    assert step_folders.latest_checkpoint(tmp_path) is None
    _fake(tmp_path, 9)
    newest = _fake(tmp_path, 10)
    assert (tmp_path / step_folders.LATEST_FILE).read_text() == "10"
    (tmp_path / "notes").mkdir()
    (tmp_path / "0000011").mkdir()
    (tmp_path / ".saving-0000012").mkdir()
    with caplog.at_level(logging.WARNING):
        assert step_folders.latest_checkpoint(tmp_path) == newest
    assert "0000011" in caplog.text and ".saving-0000012" in caplog.text and "notes" not in caplog.text


def test_saving_again_replaces_and_clears_what_was_torn(tmp_path: Path) -> None:
    _fake(tmp_path, 3)
    (tmp_path / ".saving-0000004").mkdir()
    _fake(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0000003", step_folders.LATEST_FILE]


def test_old_checkpoints_go_but_those_that_stay(tmp_path: Path) -> None:
    made = [_fake(tmp_path, step) for step in (2, 3, 4, 6, 7, 8)]
    assert step_folders.retain(tmp_path, keep_last=0, keep_every=2) == []
    removed = step_folders.retain(tmp_path, keep_last=2, keep_every=4, protected=[made[1]])
    assert [step_folders.step_of(folder) for folder in removed] == [2, 6]
    assert step_folders.checkpoints(tmp_path) == [made[1], made[2], made[4], made[5]]
    assert step_folders.retain(tmp_path, keep_last=1, keep_every=0) == made[1:3] + made[4:5]


def test_a_kill_while_replacing_loses_nothing(tmp_path: Path) -> None:
    _fake(tmp_path, 2)
    _fake(tmp_path, 3).rename(tmp_path / ".replaced-0000003")  # between the two renames
    assert step_folders.latest_checkpoint(tmp_path) == tmp_path / ".replaced-0000003"
    step_folders.begin(tmp_path, 4)
    assert step_folders.latest_checkpoint(tmp_path) == tmp_path / "0000003"


def test_unusable_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        step_folders.read_state(tmp_path / "nowhere")
    made = _fake(tmp_path, 1)
    with pytest.raises(ValueError, match=r"not a complete.*newest checkpoint inside it is .*0000001"):
        step_folders.read_state(tmp_path)
    (made / step_folders.STATE_FILE).write_text(json.dumps({"format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        step_folders.read_state(made)
    (made / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"lacks \.metadata"):
        step_folders.read_state(made)


def test_state_that_is_not_json_is_refused() -> None:
    with pytest.raises(ValueError, match="numbers, strings, lists"):
        step_folders.state_text({"planner": object()})


def test_a_copy_without_hidden_files_names_what_it_lacks(tmp_path: Path) -> None:
    folder = _fake(tmp_path, 4)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be used \(0000004: \.metadata is missing\).*hidden files"):
        step_folders.read_state(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "[" * 200_000])
def test_a_damaged_state_is_named(tmp_path: Path, content: str) -> None:
    folder = _fake(tmp_path, 4)
    (folder / step_folders.STATE_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{step_folders.STATE_FILE} is damaged"):
        step_folders.read_state(folder)


def test_retention_counts_and_removes_only_the_own_checkpoints(tmp_path: Path) -> None:
    own, other = [_fake(tmp_path, step) for step in (2, 4, 6)], _fake(tmp_path, 3)
    assert step_folders.retain(tmp_path, keep_last=2, keep_every=0, is_own=lambda folder: folder != other) == own[:1]
    assert step_folders.checkpoints(tmp_path) == [other, *own[1:]]


def test_another_runs_unfinished_save_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign = step_folders.begin(tmp_path, 2, "aaaaaaaaaaaa")
    earlier_version = step_folders.begin(tmp_path, 2)
    with caplog.at_level(logging.INFO):
        own = step_folders.begin(tmp_path, 4, "bbbbbbbbbbbb")
    assert foreign.is_dir() and not earlier_version.exists() and f"leaving {foreign}, an unfinished save of another run" in caplog.text
    assert step_folders.begin(tmp_path, 4, "bbbbbbbbbbbb") != own and not own.exists()
