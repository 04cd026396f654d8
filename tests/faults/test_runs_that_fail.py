# SPDX-License-Identifier: Apache-2.0
"""The fault matrix on whole runs: what each fault does to a run of two ranks, and that the same command continues it bit for bit.

docs/operations.md lists the rows. Saves that fail and checkpoints that are damaged are in tests/checkpoint/dist/test_faults.py and
tests/training/test_saving.py, unreadable samples in tests/training/resilience/test_unreadable_samples.py.
"""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_bagel.checkpoint.dist.step_folders import latest_checkpoint
from megatron_bagel.config.parser import Config
from tests.faults.conftest import STEPS
from tests.faults.ranks import Ranks, after_gradients, run_numbers, start_ranks, wait_for_steps
from tests.runs import run_config

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def two(world: Path, results: Path, **flags: object) -> Config:
    return run_config(world, results, 2, **{"total_steps": STEPS, "save_every": 2, **flags})


def again(config: Config) -> list[tuple]:
    """The same command once more, to the end."""
    ranks = start_ranks(config, 2)
    assert ranks.wait() == [0, 0], ranks.printed()
    return run_numbers(config)


def events(config: Config, kind: str) -> list[dict]:
    lines = (Path(config.training.results_dir) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def reports(config: Config) -> str:
    return "".join(path.read_text() for path in sorted((Path(config.training.results_dir) / "errors").glob("*.txt")))


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("number", "who"), [(signal.SIGTERM, None), pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves_with_0(
    world: Path, tmp_path: Path, straight: list[tuple], number: signal.Signals, who: int | None, workers: int
) -> None:
    """Also when one rank alone gets it: all leave after the same step, and what they saved continues as if nothing had been."""
    config = two(world, tmp_path, save_every=100, num_workers=workers)
    ranks = start_ranks(config, 2, fault=_slow_steps)
    wait_for_steps(config, 1, ranks)
    ranks.send(number, who)
    assert ranks.wait() == [0, 0], ranks.printed()
    done = len(run_numbers(config))
    assert 0 < done < STEPS
    assert latest_checkpoint(tmp_path / "checkpoints").name == f"{done:07d}"
    (event,) = events(config, "stop")
    assert f"saving after {done} steps" in event["text"]
    assert again(config) == straight


def _slow_steps(rank: int) -> None:
    """So that a signal or a kill finds a run that still has steps to go, on any machine."""
    after_gradients(lambda model, computation: time.sleep(0.5))


@pytest.mark.slow
def test_too_little_time_for_a_save_is_told_before_the_signal(world: Path, tmp_path: Path) -> None:
    config = two(world, tmp_path, total_steps=50, save_every=2, preemption_grace_seconds=0.7)
    ranks = start_ranks(config, 2, fault=_slow_steps)
    wait_for_steps(config, 3, ranks)
    first = events(config, "grace")[0]
    assert first["step"] <= 3 and first["needed_s"] > 0.7 and "--preemption_grace_seconds is 0.7" in first["text"]
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [0, 0], ranks.printed()
    (stop,) = events(config, "stop")
    assert "that should take " in stop["text"] and "the scheduler gives 0.7 s" in stop["text"]
    assert first["text"] in (tmp_path / "log.txt").read_text()


def _kill_one(config: Config, moment: float, victim: int) -> Ranks:
    ranks = start_ranks(config, 2, fault=_slow_steps)
    wait_for_steps(config, 1, ranks)
    time.sleep(moment)
    ranks.send(signal.SIGKILL, victim)
    return ranks


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_run_with_a_report(world: Path, tmp_path: Path, straight: list[tuple], times: int) -> None:
    moments, reported = random.Random(times), 0
    for number in range(times):
        config = two(world, tmp_path / str(number))
        ranks = _kill_one(config, moments.uniform(0, 1), victim=1)
        codes = ranks.wait()
        assert codes[1] in (-signal.SIGKILL, 0) and codes[0] in (0, 1, 2), ranks.printed()
        if codes[1] != 0 and codes[0] != 0:
            reported += 1
            assert "nothing from rank 1: killed" in reports(config)
            assert ranks.printed().count("megatron_bagel.train: error: ") == 1
            assert "Traceback (" not in ranks.printed()
        assert again(config) == straight
    assert reported, "no kill fell into the run"


def _poison(value: float, computation: int, rank: int = 1) -> object:
    """One gradient element of one rank becomes ``value`` in one computation."""

    def fault(here: int) -> None:
        def change(model: torch.nn.Module, now: int) -> None:
            if here == rank and now == computation:
                model.buffers[0].grad_data[7] = value

        after_gradients(change)

    return fault


def test_a_gradient_that_is_not_finite_stops_before_the_weights(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = two(world, tmp_path, save_every=3)
    ranks = start_ranks(config, 2, fault=_poison(float("nan"), 4))
    assert ranks.wait() == [1, 1]
    assert "step 4: the gradient is not finite" in ranks.printed() and "No weight was touched" in ranks.printed()
    assert ranks.printed().count("No weight was touched") == 1, "the ranks' one error is told once"
    assert [event["step"] for event in events(config, "bad_step")] == [4]
    assert again(config) == straight


@pytest.mark.slow
def test_a_skipped_step_moves_nothing_but_the_data(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights

    config = two(world, tmp_path, save_every=1, on_bad_step="skip", total_steps=5)
    ranks = start_ranks(config, 2, fault=_poison(float("inf"), 3))
    assert ranks.wait() == [0, 0], ranks.printed()
    before, after = (CheckpointWeights(tmp_path / f"checkpoints/{number:07d}") for number in (3, 4))
    for name in before.keys():  # noqa: SIM118
        assert torch.equal(before.read(name), after.read(name)) and torch.equal(before.ema(name), after.ema(name)), name
    found = run_numbers(config)
    consumed = [(record[6], record[7]) for record in found]
    assert consumed == [(record[6], record[7]) for record in straight[:5]], "the data goes on"
    assert found[:3] == straight[:3] and found[4] != straight[4]
    (event,) = events(config, "bad_step")
    assert event["step"] == 3 and event["grad_norm"] is None and "no update is made" in event["text"]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["bad_steps"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"overlap_vae_encode": True}], ids=["plain", "encoding-ahead"])
def test_a_rerun_finds_the_rank_that_computed_wrongly(world: Path, tmp_path: Path, straight: list[tuple], flags: dict) -> None:
    """A wrong result that does not come again: the second one is used, and the run is the one without the fault."""
    config = two(world, tmp_path, on_bad_step="rerun", **flags)
    ranks = start_ranks(config, 2, fault=_poison(float("nan"), 3))
    assert ranks.wait() == [0, 0], ranks.printed()
    assert run_numbers(config) == straight
    (event,) = events(config, "rerun")
    assert event["step"] == 3 and event["ranks"] == [1] and "rank 1 " in event["text"] and "good now" in event["text"]


def test_a_rank_with_another_configuration_is_refused(world: Path, tmp_path: Path) -> None:
    config = two(world, tmp_path)
    ranks = start_ranks(config, 2, others={1: two(world, tmp_path, lr=5e-4)})
    assert ranks.wait() == [2, 2]
    assert "rank 1 (on " in ranks.printed() and "--lr is 0.0005 there and 0.001 elsewhere" in ranks.printed()
    assert not (tmp_path / "checkpoints").exists()


def _other_code(rank: int) -> None:
    from megatron_bagel.training.resilience import config_fingerprint

    if rank == 1:
        config_fingerprint.megatron_bagel.__version__ = "0.0.9"


def test_a_rank_with_another_version_is_refused(world: Path, tmp_path: Path) -> None:
    ranks = start_ranks(two(world, tmp_path), 2, fault=_other_code)
    assert ranks.wait() == [2, 2]
    assert "rank 1 (on " in ranks.printed() and "megatron_bagel is 0.0.9 there and " in ranks.printed()


def _shifted_clock(rank: int) -> None:
    """The wall clock of one host is an hour off."""
    real = time.time
    if rank == 1:
        time.time = lambda: real() - 3600


@pytest.mark.slow
def test_a_clock_that_is_wrong_changes_nothing(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = two(world, tmp_path, straggler_every=2)
    ranks = start_ranks(config, 2, fault=_shifted_clock)
    assert ranks.wait() == [0, 0], ranks.printed()
    assert run_numbers(config) == straight


def _slow_loader(rank: int) -> None:
    from megatron_bagel.data.loading.pack_reader import PackReader

    original = PackReader.__getitem__

    def slow(self: PackReader, plan: object) -> object:
        time.sleep(2.0 if rank == 1 else 0)
        return original(self, plan)

    PackReader.__getitem__ = slow


@pytest.mark.slow
def test_a_slow_loader_is_named_and_changes_nothing(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = two(world, tmp_path, straggler_every=3)
    ranks = start_ranks(config, 2, fault=_slow_loader)
    assert ranks.wait() == [0, 0], ranks.printed()
    assert run_numbers(config) == straight
    assert any("slow ranks" in event["text"] and event["rank"] == 1 for event in events(config, "straggler"))


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_continues(world: Path, tmp_path: Path, straight: list[tuple]) -> None:
    config = two(world, tmp_path, hang_timeout_minutes=0.5)
    ranks = start_ranks(config, 2, fault=_slow_steps)
    wait_for_steps(config, 3, ranks)
    ranks.send(signal.SIGSTOP, 1)
    ranks.processes[0].join(240)
    assert ranks.processes[0].exitcode == 18, ranks.printed()
    ranks.kill()
    assert "rank 1 (" in reports(config) and "does not answer" in reports(config)
    assert again(config) == straight
