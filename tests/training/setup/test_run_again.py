# SPDX-License-Identifier: Apache-2.0
"""Whole runs over the folders of an earlier one: continued as they were, refused by the flag that must match, or moved aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_bagel.checkpoint.dist.step_folders import read_state
from megatron_bagel.training.observability.metrics_file import read_history
from megatron_bagel.training.resilience.run_identity import RunIdentity
from megatron_bagel.training.resilience.run_lock import LOCK
from tests.runs import make_world, run, run_config

pytestmark = pytest.mark.distributed


def test_a_run_and_those_that_come_after_it(tmp_path: Path) -> None:
    world, results = make_world(tmp_path / "world"), tmp_path / "run"
    run(run_config(world, results, total_steps=2))
    identity = RunIdentity.read(results)
    assert identity is not None and identity == RunIdentity.read(results / "checkpoints")
    assert {record["run"] for record in read_history(results / "metrics.jsonl")} == {identity.run_id}
    assert read_state(results / "checkpoints/0000002")["run"]["run_id"] == identity.run_id
    assert list(results.rglob(LOCK)) == []

    for changes, message in (
        ({"global_seed": 77}, "cannot continue from .*0000002: --global_seed is 77, and 4396 in the checkpoint"),
        ({"use_distributed_optimizer": False}, "--use_distributed_optimizer is False, and True in the checkpoint"),
        ({"auto_resume": False}, "--checkpoint_dir .* holds checkpoints of an earlier run"),
    ):
        with pytest.raises(AssertionError, match=message):
            run(run_config(world, results, total_steps=3, **changes))
    assert list(results.rglob(LOCK)) == [], "a run that was refused gives the folders back"

    run(run_config(world, results, total_steps=3, lr=5e-4))
    log = (results / "log.txt").read_text()
    assert "changed on resume: --lr is 0.0005, and 0.001 in the checkpoint" in log
    assert "changed on resume: --total_steps is 3, and 2 in the checkpoint" in log and log.count("changed on resume") == 2
    assert len(run(run_config(world, results, total_steps=3, lr=5e-4))) == 3
    assert "nothing to train: 3 steps are done" in (results / "log.txt").read_text()

    fresh = run(run_config(world, results, total_steps=1, auto_resume=False, overwrite_run=True))
    assert [record["step"] for record in fresh] == [0] and fresh[0]["run"] != identity.run_id
    moved = (results / "overwritten-001/metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["run"] for line in moved} == {identity.run_id} and len(moved) == 3
    assert (results / "checkpoints/overwritten-001/0000003").is_dir() and (results / "checkpoints/0000001").is_dir()
