"""Training goes on from a checkpoint bit for bit, on as many ranks as it likes; what does not fit is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.tiny_run import load_and_train, same, train_and_save
from tests.distributed import run_ranks


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": False}, {"frozen": "decoder"}], ids=["distributed", "plain", "frozen"])
def test_continuation_equals_the_run_that_was_not_stopped(tmp_path: Path, options: dict) -> None:
    [expected] = run_ranks(train_and_save, 1, tmp_path, options, parallel={})
    [(step, state, got)] = run_ranks(load_and_train, 1, tmp_path / "0000002", options, parallel={})
    assert (step, state) == (2, {"note": 2, "ratio": 0.1})
    assert same(expected, got)


@pytest.mark.distributed
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_two_ranks_continue_and_another_number_takes_over(tmp_path: Path, bf16: bool) -> None:
    options = {"bf16": bf16}
    expected = run_ranks(train_and_save, 2, tmp_path, options, parallel={})
    assert same(expected[0], expected[1])
    for _, _, got in run_ranks(load_and_train, 2, tmp_path / "0000002", options, parallel={}):
        assert same(expected[0], got)
    stored = run_ranks(load_and_train, 2, tmp_path / "0000002", options, 0, parallel={})[0][2]
    for ranks in (1, 3):
        for _, _, got in run_ranks(load_and_train, ranks, tmp_path / "0000002", options, 0, parallel={}):
            assert same(stored, got)
