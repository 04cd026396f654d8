# SPDX-License-Identifier: Apache-2.0
"""The profiler's window: which steps and ranks it covers, and that what it writes is a trace with the phases' names in it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from megatron_bagel.config.observing_arguments import ObservingArguments
from megatron_bagel.training.hooks import Hooks
from megatron_bagel.training.observability.profiling import ProfilerWindow
from megatron_bagel.training.observability.timers import Timers


def profiled(folder: Path, steps: range, rank: int = 0, **flags: object) -> list[str]:
    """Names of the traces that a run of ``steps`` leaves."""
    settings = ObservingArguments(**{"profile": True, "profile_step_start": 2, "profile_step_end": 4, **flags})
    timers = Timers()
    with Hooks([ProfilerWindow(settings, folder, rank)]) as hooks:
        for step in steps:
            hooks.before_step(step)
            with timers("forward_backward"):
                torch.ones(4, 4) @ torch.ones(4, 4)
    return sorted(path.name for path in folder.glob("traces/*"))


@pytest.mark.parametrize(
    ("steps", "names"),
    [
        (range(6), ["rank0_steps2-3.json.gz"]),
        (range(3, 9), ["rank0_steps3-3.json.gz"]),  # resumed inside the window
        (range(3), ["rank0_steps2-2.json.gz"]),  # ended inside it
        (range(4, 9), []),
    ],
)
def test_the_window_is_what_a_run_has_of_it(tmp_path: Path, steps: range, names: list[str]) -> None:
    assert profiled(tmp_path, steps) == names


def test_the_trace_is_readable_and_names_the_phases(tmp_path: Path) -> None:
    (name,) = profiled(tmp_path, range(6), profile_shapes=True)
    with gzip.open(tmp_path / "traces" / name) as file:
        events = json.load(file)["traceEvents"]
    phases = [event for event in events if event.get("name") == "forward_backward" and event.get("ph") == "X"]
    assert len(phases) == 2 and all(event["dur"] > 0 for event in phases)
    products = [event for event in events if event.get("name") == "aten::mm"]
    assert len(products) == 2 and products[0]["args"]["Input Dims"][:2] == [[4, 4], [4, 4]]


@pytest.mark.parametrize("change", [{"profile": False}, {"profile_ranks": [1]}])
def test_who_is_not_asked_profiles_nothing(tmp_path: Path, change: dict[str, object]) -> None:
    assert profiled(tmp_path, range(6), **change) == []


def test_an_error_leaves_the_trace_so_far(tmp_path: Path) -> None:
    flags = ObservingArguments(profile=True, profile_step_start=0, profile_ranks=[0, 3])
    with pytest.raises(ZeroDivisionError), Hooks([ProfilerWindow(flags, tmp_path, 3)]) as hooks:
        for step in range(2):
            hooks.before_step(step)
            1 // (1 - step)
    assert [path.name for path in tmp_path.glob("traces/*")] == ["rank3_steps0-1.json.gz"]
