# SPDX-License-Identifier: Apache-2.0
"""Local checkpoints: the same ranks go on from them bit for bit, and anything that does not fit is passed over with its reason."""

from __future__ import annotations

import logging
import re
import resource
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.tiny_run import averages, same, tiny_run, train_step, weights
from tests.distributed import run_ranks

pytest.importorskip("nvidia_resiliency_ext", reason='nvidia-resiliency-ext is not installed: pip install -e ".[resiliency]"')
pytestmark = pytest.mark.distributed
Tensors = dict[str, torch.Tensor]


def _local(folder: Path) -> Any:
    from megatron_bagel.checkpoint.dist.local import LocalCheckpoints

    return LocalCheckpoints(str(folder / "local"), str(folder / "global"), 1)


def _train_and_save(folder: Path, options: dict, steps: int = 2, more: int = 2) -> Tensors:
    """Train, saving after every one of ``steps``, go on for ``more``; returns the final weights and averages."""
    trained, local = tiny_run(**options), _local(folder)
    for step in range(steps):
        train_step(trained, step)
        local.save(step + 1, trained, {"note": step + 1})
    for step in range(steps, steps + more):
        train_step(trained, step)
    return weights(trained) | averages(trained)


def _load_and_train(folder: Path, options: dict, after: int = 0, more: int = 2) -> tuple[int, dict, Tensors]:
    """Go on with a run that was initialised otherwise; step 0 when nothing local was used. What is newer is forgotten."""
    trained, local = tiny_run(**options, seed=99), _local(folder)
    found = local.newest(after, trained)
    if found is None:
        local.forget_after(after)
        return 0, {}, {}
    local.load(trained)
    for number in range(found.step, found.step + more):
        train_step(trained, number)
    return found.step, found.state, weights(trained) | averages(trained)


def _shares(folder: Path, rank: int, suffix: str = "pt") -> list[Path]:
    return sorted((folder / "local").glob(f"*/{rank}/*.{suffix}"))


@pytest.mark.parametrize(
    ("ranks", "parallel", "options"),
    [
        pytest.param(1, {}, {}, id="one"),
        pytest.param(2, {}, {}, id="data"),
        pytest.param(2, {}, {"bf16": True}, id="bf16"),
        pytest.param(2, {}, {"distributed_optimizer": False}, id="plain"),
        pytest.param(2, {}, {"frozen": "decoder"}, id="frozen"),
        pytest.param(2, {"tensor_model_parallel_size": 2}, {}, id="tensor"),
    ],
)
def test_the_same_ranks_continue_bit_for_bit(tmp_path: Path, ranks: int, parallel: dict, options: dict) -> None:
    expected = run_ranks(_train_and_save, ranks, tmp_path, options, parallel=parallel)
    for rank in range(ranks):
        # The newest alone is kept, in one file and the note beside it.
        assert [path.name for path in _shares(tmp_path, rank, "*")] == [f"iter_0000002_{rank}_local.{end}" for end in ("json", "pt")]
    got = run_ranks(_load_and_train, ranks, tmp_path, options, parallel=parallel)
    for rank in range(ranks):
        assert got[rank][:2] == (2, {"note": 2})
        assert same(expected[rank], got[rank][2])


def test_data_parallel_ranks_share_what_they_hold_alike(tmp_path: Path) -> None:
    """Two files of half the size of one rank's."""
    run_ranks(_train_and_save, 1, tmp_path / "one", {}, parallel={})
    run_ranks(_train_and_save, 2, tmp_path / "two", {}, parallel={})
    [whole] = map(_tensor_bytes, _shares(tmp_path / "one", 0))
    halves = [_tensor_bytes(path) for rank in range(2) for path in _shares(tmp_path / "two", rank)]
    assert len(halves) == 2 and max(halves) < 0.7 * whole and sum(halves) < 1.1 * whole


def _tensor_bytes(path: Path) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in torch.load(path, weights_only=False).tensors)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _of_another_start(folder: Path) -> None:
    """Rank 1's share comes from a run that was started another time."""
    run_ranks(_train_and_save, 2, folder / "again", {}, parallel={})
    for suffix in ("pt", "json"):
        _shares(folder, 1, suffix)[0].write_bytes(_shares(folder / "again", 1, suffix)[0].read_bytes())


def _follows(folder: Path) -> None:
    """The share was saved after a checkpoint of step 1 that is gone."""
    note = _shares(folder, 0, "json")[0]
    note.write_text(note.read_text().replace('"follows": null', '"follows": 1'))


REFUSALS: Mapping[str, tuple[Callable[[Path], object], dict, dict, str]] = {
    "missing": (lambda folder: _shares(folder, 1)[0].unlink(), {}, {}, "not there for rank 1"),
    "flipped": (lambda folder: _flip(_shares(folder, 1)[0]), {}, {}, "rank 1.* does not have the checksum"),
    "unfinished": (lambda folder: _shares(folder, 0, "json")[0].unlink(), {}, {}, "rank 0.* its save did not finish"),
    "torn note": (lambda folder: _shares(folder, 0, "json")[0].write_text("{"), {}, {}, "its note is damaged"),
    "layout": (lambda folder: None, {"tensor_model_parallel_size": 2}, {}, "other parallel sizes .ranks 2; now ranks 2, tensor 2"),
    "frozen": (lambda folder: None, {}, {"frozen": "decoder"}, "frozen parts or the optimizer's buffers have changed"),
    "mixed": (_of_another_start, {}, {}, "saved by different starts"),
    "set back": (_follows, {}, {}, "continues the checkpoint of step 1, which is not in"),
}


def _passed_over(folder: Path, options: dict) -> tuple[int, str]:
    """(step continued from, what rank 0 said)."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("megatron_bagel.checkpoint.dist.local").addHandler(handler)
    return _load_and_train(folder, options)[0], " ".join(told)


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_fit_is_passed_over_and_removed(tmp_path: Path, case: str) -> None:
    spoil, parallel, options, reason = REFUSALS[case]
    run_ranks(_train_and_save, 2, tmp_path, {}, parallel={})
    spoil(tmp_path)
    (step, told), _ = run_ranks(_passed_over, 2, tmp_path, options, parallel=parallel)
    assert step == 0
    assert re.search(reason, told), told
    assert not _shares(tmp_path, 0, "*") and not _shares(tmp_path, 1, "*")


def test_an_older_one_than_the_checkpoint_is_not_used(tmp_path: Path) -> None:
    run_ranks(_train_and_save, 2, tmp_path, {}, parallel={})
    assert [step for step, *_ in run_ranks(_load_and_train, 2, tmp_path, {}, 2, parallel={})] == [0, 0]


def _killed_while_saving(folder: Path) -> None:
    """Rank 1's next share is not whole yet, and rank 0's is."""
    for rank, name in ((0, "iter_0000003_0_local.pt"), (1, "iter_0000003_1_local.dirty.pt")):
        (_shares(folder, rank)[0].parent / name).write_bytes(b"half")


def test_a_save_cut_short_leaves_the_one_before_it(tmp_path: Path) -> None:
    run_ranks(_train_and_save, 2, tmp_path, {}, 2, 1, parallel={})
    _killed_while_saving(tmp_path)
    expected = run_ranks(_go_on_and_save, 2, tmp_path, parallel={})
    assert [step for step, _ in expected] == [2, 2]
    # The file that the kill left is not in the way of the same step's next save.
    got = run_ranks(_load_and_train, 2, tmp_path, {}, 0, 0, parallel={})
    assert [step for step, *_ in got] == [3, 3]
    assert all(same(before, after) for (_, before), (*_, after) in zip(expected, got, strict=True))


def _go_on_and_save(folder: Path) -> tuple[int, Tensors]:
    trained, local = tiny_run(seed=99), _local(folder)
    found = local.newest(0, trained)
    local.load(trained)
    local.forget_after(found.step)
    train_step(trained, found.step)
    local.save(found.step + 1, trained, {})
    return found.step, weights(trained) | averages(trained)


def _full_disk_on_rank_1(folder: Path) -> str:
    trained, local = tiny_run(), _local(folder)
    train_step(trained, 0)
    local.save(1, trained, {})
    train_step(trained, 1)
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("megatron_bagel.checkpoint.dist.local").addHandler(handler)
    if torch.distributed.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    local.save(2, trained, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return " ".join(told)


def test_a_full_disk_is_a_warning_and_the_one_before_stays(tmp_path: Path) -> None:
    told, _ = run_ranks(_full_disk_on_rank_1, 2, tmp_path, parallel={})
    assert "step 2 was not saved" in told and "rank 1: " in told
    assert [step for step, *_ in run_ranks(_load_and_train, 2, tmp_path, {}, 0, 0, parallel={})] == [1, 1]


def _save_before_any_update(folder: Path) -> None:
    trained, local = tiny_run(), _local(folder)
    local.save(1, trained, {})
    assert not _shares(folder, torch.distributed.get_rank(), "*")
    train_step(trained, 1)
    local.save(2, trained, {})


def test_the_first_save_waits_for_an_update(tmp_path: Path) -> None:
    """A first step that is bad and left out gives the optimizer no moments, and a share without them could not be loaded."""
    run_ranks(_save_before_any_update, 2, tmp_path, parallel={})
    assert [step for step, *_ in run_ranks(_load_and_train, 2, tmp_path, {}, 0, 0, parallel={})] == [2, 2]
