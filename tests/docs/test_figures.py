# SPDX-License-Identifier: Apache-2.0
"""The drawn figures are what their scripts write, every picture of the pages has a script, and the drawn pipeline follows the formula of
docs/parallelism.md."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import pytest

from tests.docs.commands import PAGES, ROOT

FIGURES = ROOT / "docs" / "figures"
DRAWN = ("step", "pack", "expert_order", "shared_images", "index_files")
#: Pictures of trained models, which their commands draw: picture -> the page that names the command.
TRAINED = {
    "small_world_grid.png": "small_world.md",
    "small_world_marks.png": "small_world.md",
    "small_world_experts.png": "sparse_experts.md",
    "strip.png": "figures/strip.py",
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FIGURES))  # scripts find each other as they do when they are started
    return importlib.import_module


@pytest.fixture
def step(load) -> ModuleType:
    return load("step")


@pytest.mark.parametrize("name", DRAWN)
def test_a_drawn_figure_is_what_its_script_writes(load, name: str) -> None:
    figure = load(name)
    assert figure.OUTPUT.read_text(encoding="utf-8") == figure.svg(), f"run python docs/figures/{name}.py"


def test_every_picture_has_a_script() -> None:
    pictures = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert pictures == {f"{name}.svg" for name in DRAWN} | set(TRAINED)
    for picture, source in TRAINED.items():
        assert picture.split(".")[0].split("_")[-1] in (ROOT / "docs" / source).read_text(encoding="utf-8")


def test_every_drawn_figure_is_on_a_page() -> None:
    shown = {name for page in PAGES for name in re.findall(r"images/(\w+)\.svg", page.read_text(encoding="utf-8"))}
    assert shown == set(DRAWN)


@pytest.mark.parametrize(("stages", "microbatches"), [(1, 3), (2, 4), (4, 2), (4, 8)])
def test_the_drawn_schedule_has_the_bubble_of_the_formula(
    step: ModuleType, monkeypatch: pytest.MonkeyPatch, stages: int, microbatches: int
) -> None:
    monkeypatch.setattr(step, "STAGES", stages)
    monkeypatch.setattr(step, "MICROBATCHES", microbatches)
    passes = step.schedule()
    assert len(passes) == 2 * stages * microbatches
    length = max(one.end for one in passes)
    busy = sum(one.end - one.start for one in passes if one.stage == 0)
    assert 1 - busy / length == pytest.approx((stages - 1) / (microbatches + stages - 1))
