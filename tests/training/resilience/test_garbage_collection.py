# SPDX-License-Identifier: Apache-2.0
"""Garbage collection at chosen steps: exactly there, on every rank, and a run's numbers do not notice."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_bagel.config.parser import Config
from megatron_bagel.training.hooks import Hooks, Pause, StepHook
from megatron_bagel.training.resilience.garbage_collection import GarbageCollection
from megatron_bagel.training.step_result import StepDone
from tests.distributed import run_ranks
from tests.runs import make_world, numbers, open_run, run_config
from tests.training.observability.test_metrics import metrics


class Cycle:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


@contextmanager
def generations_collected() -> Iterator[list[int]]:
    """The generation of every collection in this process while the block runs."""
    collected: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            collected.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield collected
    finally:
        gc.callbacks.remove(note)


@pytest.fixture
def automatic() -> Iterator[Callable[[bool], None]]:
    """Turns the automatic collector on or off for a test."""
    before = gc.isenabled()
    yield lambda on: gc.enable() if on else gc.disable()
    (gc.enable if before else gc.disable)()


@pytest.mark.parametrize(("interval", "expected"), [(0, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_garbage_goes_after_every_interval_and_at_no_other_time(interval: int, expected: list[int]) -> None:
    steps = []
    with Hooks([GarbageCollection(interval)]) as hooks, generations_collected() as collected:
        for step in range(6):
            garbage = weakref.ref([Cycle() for _ in range(20_000)][0])
            assert garbage() is not None and len(collected) == len(steps), "so much garbage makes the automatic collector run"
            hooks.after_step(metrics(step).done)
            if len(collected) > len(steps):
                assert garbage() is None
                steps.append(step + 1)
    assert steps == expected and set(collected) <= {2}


def test_evaluations_are_surrounded_and_saves_are_not() -> None:
    with Hooks([GarbageCollection(0)]) as hooks, generations_collected() as collected:
        for pause in (Pause.SAVE, Pause.LOCAL_SAVE, Pause.LAST_SAVE):
            with hooks.pause(pause):
                pass
        assert collected == []
        with hooks.pause(Pause.EVALUATION):
            assert collected == [2]
        assert collected == [2, 0]


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_automatic_collector_is_as_before_after_a_run(automatic: Callable[[bool], None], enabled: bool, fails: bool) -> None:
    automatic(enabled)
    try:
        with generations_collected() as collected, Hooks([GarbageCollection(1)]):
            assert not gc.isenabled() and collected == [2]
            if fails:
                raise ArithmeticError
    except ArithmeticError:
        pass
    assert gc.isenabled() == enabled


class Progress(StepHook):
    """Knows how many steps are done, and whether the run saves just now."""

    steps, saves = 0, False

    def after_step(self, done: StepDone) -> None:
        self.steps = done.counters.steps

    @contextmanager
    def pause(self, pause: Pause) -> Iterator[None]:
        self.saves = pause is not Pause.EVALUATION
        yield
        self.saves = False


def _collections(config: Config) -> tuple[list[tuple[int, int]], bool]:
    """(steps done, generation) of each collection of a run on this rank, and whether the collector is on afterwards.

    Without those inside of saves: Megatron-Core's checkpoints collect for themselves.
    """
    from megatron_bagel.training import loop

    run = open_run(config)
    progress, collected = Progress(), []

    def note(phase: str, info: dict[str, Any]) -> None:
        if phase == "start" and not gc.isenabled() and not progress.saves:
            collected.append((progress.steps, info["generation"]))

    # In front of the run's own: a collection after a step then finds the step counted.
    run.hooks = Hooks([progress, run.hooks])
    gc.callbacks.append(note)
    loop.train(run)
    gc.callbacks.remove(note)
    run.loader.close()
    run.log.close()
    return collected, gc.isenabled()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_of_a_run_collect_at_the_same_steps_and_its_numbers_stay(world: Path, tmp_path: Path) -> None:
    from megatron_bagel.training.observability.metrics_file import read_history

    flags = {"total_steps": 5, "split": "3,1", "eval_every": 3, "eval_samples": 2, "eval_pictures": 0}
    by_itself = run_config(world, tmp_path / "automatic", 2, **flags)
    chosen = run_config(world, tmp_path / "manual", 2, **flags, manual_gc=True, manual_gc_interval=2)
    assert run_ranks(_collections, 2, by_itself, timeout=240) == [([], True)] * 2
    evaluated = [(3, 2), (3, 0), (5, 2), (5, 0)]
    expected = sorted([(0, 2), (2, 2), (4, 2), *evaluated], key=lambda entry: entry[0])
    assert run_ranks(_collections, 2, chosen, timeout=240) == [(expected, True)] * 2
    histories = [numbers(read_history(tmp_path / name / "metrics.jsonl")) for name in ("automatic", "manual")]
    assert histories[0] == histories[1] and len(histories[0]) == 5


def test_an_interval_without_manual_gc_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--manual_gc_interval 5 needs --manual_gc"):
        run_config(world, tmp_path, manual_gc_interval=5)
    with pytest.raises(ValueError, match="--manual_gc_interval is -1"):
        run_config(world, tmp_path, manual_gc=True, manual_gc_interval=-1)
