# SPDX-License-Identifier: Apache-2.0
"""One process writes into a folder at a time: a live holder is named, a dead one replaced, and one on another host is waited for."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_bagel.training.resilience.lock_holder import LockHolder
from megatron_bagel.training.resilience.run_lock import LOCK, LockTimes, RunLock
from tests.distributed import fork

SHORT = LockTimes(beat=0.02, patience=0.5)


def lock(folder: Path, times: LockTimes = SHORT) -> RunLock:
    return RunLock(folder, "--checkpoint_dir", times)


def elsewhere(folder: Path) -> LockHolder:
    """Write the lock of a process on another host."""
    holder = replace(LockHolder.this_process(), host="node7", machine="node7 another boot", process=41)
    (folder / LOCK).write_text(holder.text())
    return holder


def held_by_child(folder: Path) -> int:
    """A process that takes the lock and ends without giving it back; returns its number."""

    def hold() -> None:
        lock(folder).acquire()
        os._exit(0)

    process = fork(hold)
    process.join(60)
    assert process.exitcode == 0 and (folder / LOCK).is_file()
    return process.pid


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    held = lock(tmp_path / "new")
    held.acquire()
    holder = LockHolder.parse((tmp_path / "new" / LOCK).read_text())
    assert holder is not None and holder.process == os.getpid() and holder.is_this_process() and holder.is_alive()
    held.check()
    held.release()
    assert list((tmp_path / "new").iterdir()) == []


def test_a_live_process_on_this_host_is_named(tmp_path: Path) -> None:
    ready, done = os.pipe(), os.pipe()

    def hold() -> None:
        lock(tmp_path).acquire()
        os.write(ready[1], b".")
        os.read(done[0], 1)

    process = fork(hold)
    os.read(ready[0], 1)
    try:
        with pytest.raises(ValueError, match=rf"--checkpoint_dir .* is in use by another run \(process {process.pid} on host .*, since 20"):
            lock(tmp_path).acquire()
    finally:
        os.write(done[1], b".")
        process.join(60)
    lock(tmp_path).acquire()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    dead = held_by_child(tmp_path)
    taken = lock(tmp_path)
    taken.acquire()
    taken.check()
    holder = LockHolder.parse((tmp_path / LOCK).read_text())
    assert holder is not None and holder.process == os.getpid() != dead
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_process_number_that_is_used_again_is_no_holder(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(replace(LockHolder.this_process(), process=os.getppid(), started="1").text())
    lock(tmp_path).acquire()


def test_a_restart_in_the_same_process_takes_its_lock_again(tmp_path: Path) -> None:
    lock(tmp_path).acquire()
    again = lock(tmp_path)
    again.acquire()
    again.check()


def test_a_still_lock_of_another_host_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    elsewhere(tmp_path)
    taken = lock(tmp_path)
    taken.acquire()
    taken.check()
    assert "is locked by process 41 on host node7" in caplog.text


def test_a_lock_of_another_host_that_shows_life_is_respected(tmp_path: Path) -> None:
    holder, ended = elsewhere(tmp_path), threading.Event()

    def touch() -> None:
        while not ended.wait(0.02):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ValueError, match="in use by another run .process 41 on host node7"):
            lock(tmp_path, LockTimes(beat=0.02, patience=60)).acquire()
    finally:
        ended.set()
        thread.join()
    assert (tmp_path / LOCK).read_text() == holder.text()


def test_a_half_written_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text('{"host": "no')
    lock(tmp_path).acquire()


def test_the_holder_shows_life(tmp_path: Path) -> None:
    held = lock(tmp_path)
    held.acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    changed = threading.Event()
    while not changed.wait(0.01):
        if (tmp_path / LOCK).stat().st_mtime_ns:
            changed.set()
    held.release()


def test_a_process_that_lost_its_lock_is_told_and_leaves_it(tmp_path: Path) -> None:
    held = lock(tmp_path)
    held.acquire()
    other = elsewhere(tmp_path)
    with pytest.raises(ValueError, match="was taken over by another run .process 41 on host node7"):
        held.check()
    held.release()
    assert (tmp_path / LOCK).read_text() == other.text()


def test_a_lock_file_that_was_removed_by_hand_is_made_again(tmp_path: Path) -> None:
    held = lock(tmp_path)
    held.acquire()
    (tmp_path / LOCK).unlink()
    held.check()
    assert (tmp_path / LOCK).is_file()
