# SPDX-License-Identifier: Apache-2.0
"""The drawn step is what its script writes, and its pipeline follows the formula of docs/parallelism.md."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from tests.docs.commands import ROOT


@pytest.fixture(scope="module")
def figure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_figures_step", ROOT / "docs" / "figures" / "step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_drawn_step_is_what_its_script_writes(figure: ModuleType) -> None:
    assert figure.OUTPUT.read_text(encoding="utf-8") == figure.svg(), "run python docs/figures/step.py"


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 2), (4, 8)])
def test_the_drawn_schedule_has_the_bubble_of_the_formula(
    figure: ModuleType, monkeypatch: pytest.MonkeyPatch, stages: int, microbatches: int
) -> None:
    monkeypatch.setattr(figure, "STAGES", stages)
    monkeypatch.setattr(figure, "MICROBATCHES", microbatches)
    passes = figure.schedule()
    assert len(passes) == 2 * stages * microbatches
    length = max(step.end for step in passes)
    busy = sum(step.end - step.start for step in passes if step.stage == 0)
    assert 1 - busy / length == pytest.approx((stages - 1) / (microbatches + stages - 1))
