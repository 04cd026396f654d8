# SPDX-License-Identifier: Apache-2.0
"""Hooks of the loop: called in one order around every step, paused around evaluations and saves, closed whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.config.parser import Config
from megatron_bagel.training.hooks import Hooks, Pause, StepHook
from megatron_bagel.training.step_result import StepDone
from tests.distributed import run_ranks
from tests.runs import make_world, numbers, open_run, run, run_config


class Recorder(StepHook):
    """Writes down what it is called for; ``breaks`` is the moment at which it raises."""

    def __init__(self, calls: list[Any], name: str = "", breaks: str | None = None) -> None:
        self._calls, self._name, self._breaks = calls, name, breaks

    def _note(self, moment: str, *values: Any) -> None:
        self._calls.append(" ".join([self._name, moment, *map(str, values)]).strip())
        if moment == self._breaks:
            raise ArithmeticError(f"{self._name} cannot {moment}".strip())

    def start(self) -> None:
        self._note("start")

    def before_step(self, step: int) -> None:
        self._note("before", step)

    def data_loaded(self) -> None:
        self._note("loaded")

    def batch_settled(self) -> None:
        self._note("settled")

    def gradients_ready(self) -> None:
        self._note("gradients")

    def after_step(self, done: StepDone) -> None:
        assert done.seconds > 0 and done.result.losses.loss > 0
        self._note("after", done.step, done.counters.samples)

    @contextmanager
    def pause(self, pause: Pause) -> Iterator[None]:
        self._note("pause", pause.value)
        yield
        self._note("resume", pause.value)

    def close(self) -> None:
        self._note("close")


def test_hooks_are_called_in_order_and_end_in_reverse() -> None:
    calls: list[str] = []
    with Hooks([Recorder(calls, "first"), StepHook(), Recorder(calls, "second")]) as hooks:
        hooks.before_step(3)
        with hooks.pause(Pause.SAVE):
            calls.append("saving")
    assert calls == [
        "first start", "second start", "first before 3", "second before 3", "first pause a save", "second pause a save", "saving",
        "second resume a save", "first resume a save", "second close", "first close",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("breaks", "closed"),
    [
        ("start", ["first close"]),  # what has not started is not closed
        ("before", ["third close", "second close", "first close"]),
        ("close", ["third close", "second close", "first close"]),
    ],
)
def test_an_error_of_a_hook_is_raised_and_all_that_started_are_closed(breaks: str, closed: list[str]) -> None:
    calls: list[str] = []
    hooks = Hooks([Recorder(calls, "first"), Recorder(calls, "second", breaks), Recorder(calls, "third")])
    with pytest.raises(ArithmeticError, match=f"second cannot {breaks}"), hooks:
        hooks.before_step(0)
    assert [call for call in calls if call.endswith("close")] == closed


def _watched(config: Config, breaks: str | None) -> tuple[list[str], str]:
    """What a hook sees of a run on this rank, and the error that ended the run."""
    from megatron_bagel.training import loop

    run = open_run(config)
    calls, error = [], ""
    run.hooks = Hooks([run.hooks, Recorder(calls, breaks=breaks)])
    try:
        loop.train(run)
    except ArithmeticError as raised:
        error = str(raised)
    finally:
        run.loader.close()
        run.log.close()
    return calls, error


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.distributed
def test_a_hook_sees_every_moment_of_a_run(world: Path, tmp_path: Path) -> None:
    flags = {"total_steps": 3, "save_every": 2, "split": "3,1", "eval_every": 3, "eval_samples": 2, "eval_pictures": 0}
    [(calls, error)] = run_ranks(_watched, 1, run_config(world, tmp_path, **flags), None, timeout=240)
    samples = [record["consumed_samples"] for record in _history(tmp_path)]
    one_step = ["before {0}", "loaded", "settled", "gradients", "after {0} {1}"]
    steps = [[text.format(number, samples[number]) for text in one_step] for number in range(3)]
    assert calls == [
        "start", *steps[0], *steps[1], "pause a save", "resume a save", *steps[2], "pause an evaluation", "resume an evaluation",
        "pause a save", "resume a save", "pause the last save", "resume the last save", "close",
    ]  # fmt: skip
    assert error == ""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_hook_that_fails_ends_the_run_with_its_error(world: Path, tmp_path: Path) -> None:
    config = run_config(world, tmp_path / "broken", 2, total_steps=3, save_every=1)
    for calls, error in run_ranks(_watched, 2, config, "gradients", timeout=240):
        assert error == "cannot gradients" and calls == ["start", "before 0", "loaded", "settled", "gradients", "close"]
    assert _history(tmp_path / "broken") == [], "no step was done"
    whole = numbers(run(run_config(world, tmp_path / "whole", 2, total_steps=3, save_every=1), ranks=2))
    assert numbers(run(config, ranks=2)) == whole


def _history(results: Path) -> list[dict[str, Any]]:
    from megatron_bagel.training.observability.metrics_file import read_history

    return read_history(results / "metrics.jsonl")
