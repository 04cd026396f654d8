# SPDX-License-Identifier: Apache-2.0
"""Goodput: the formula is what a simulated run shows, and the best interval is the best."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megatron_bagel.cli.plan import main
from megatron_bagel.planning.goodput import Reliability, best_interval, ettr, goodput

HOUR = 3600.0
USUAL = Reliability(failures_per_gpu_day=0.0005, restart_seconds=600, save_seconds=30)


def simulated(interval: float, mean_failure: float, reliability: Reliability, intervals: int) -> float:
    """The share of time that trains in a long run with random failures, which lose the progress since the last save."""
    generator = np.random.default_rng(0)
    time = done = 0.0
    needed, restart = interval + reliability.save_seconds, reliability.restart_seconds
    while done < intervals:
        to_failure = generator.exponential(mean_failure)
        while to_failure >= needed and done < intervals:
            time, to_failure, done = time + needed, to_failure - needed, done + 1
        if done < intervals:
            time += to_failure
            while (to_failure := generator.exponential(mean_failure)) < restart:
                time += to_failure
            time += restart
    return intervals * interval / time


@pytest.mark.parametrize(("interval", "mean_failure"), [(0.5 * HOUR, 6 * HOUR), (2 * HOUR, 3 * HOUR), (600, 50 * HOUR)])
def test_the_formula_is_what_a_simulation_shows(interval: float, mean_failure: float) -> None:
    assert ettr(interval, mean_failure, USUAL) == pytest.approx(simulated(interval, mean_failure, USUAL, 20_000), rel=0.02)


@pytest.mark.parametrize("mean_failure", [0.2 * HOUR, 3 * HOUR, 40 * HOUR, 2000 * HOUR])
def test_the_best_interval_is_best_and_near_youngs(mean_failure: float) -> None:
    best = best_interval(mean_failure, USUAL)
    assert all(ettr(best, mean_failure, USUAL) > ettr(best * factor, mean_failure, USUAL) for factor in (0.5, 0.9, 1.1, 2))
    # Young's first-order rule holds where saves are short beside the time between failures.
    assert best == pytest.approx(math.sqrt(2 * USUAL.save_seconds * mean_failure), rel=0.25 if mean_failure < HOUR else 0.05)


def test_more_gpus_save_more_often_and_train_less() -> None:
    runs = [goodput(10, gpus, 500, USUAL) for gpus in (256, 2048, 16384)]
    assert [run.best_save_every for run in runs] == sorted((run.best_save_every for run in runs), reverse=True)
    assert runs[0].ettr > runs[1].ettr > runs[2].ettr and all(run.best_ettr >= run.ettr for run in runs)
    # 16,384 GPUs at this rate: the interruptions of Llama 3's report, 419 in 54 days.
    assert 54 * 24 / runs[2].hours_between_failures == pytest.approx(419, rel=0.06)


def test_without_failures_saves_alone_cost_time() -> None:
    run = goodput(10, 64, 100, Reliability(0, 600, 30, straggler_share=0.1))
    assert run.ettr == run.best_ettr == 1100 / 1130 and run.to_dict()["hours_between_failures"] is None


@pytest.mark.filterwarnings("ignore")
def test_the_plan_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "qwen2.5-0.5b-mot", "--gpus", "8", "--seq_length", "8192", "--global_batch_size", "8", "--save_every", "1000"]
    assert main([*words, "--failures_per_gpu_day", "0.01"]) == 0
    printed = capsys.readouterr().out
    assert "a failure every 300.0 hours" in printed and "a save every 1000 steps" in printed and "0.01 failures per GPU and day" in printed
    assert main([*words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    found, step = answer["plans"][0]["goodput"], answer["plans"][0]["estimate"]["step_time_s"]
    # Failures are rare on 8 GPUs, so the saves decide.
    assert found["ettr"] == pytest.approx(1000 * step / (1000 * step + 30), rel=0.01) and answer["assumed"]["restart_seconds"] == 600
