# SPDX-License-Identifier: Apache-2.0
"""Ranges and choices stand in a flag's field, and one function checks them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pytest

from megatron_bagel.config.flag import Flag, Range, check_values, flag, megatron_flag, original_flag
from megatron_bagel.config.plan_arguments import PlanArguments, PrintArguments
from megatron_bagel.config.sections import SECTIONS


@dataclass
class Example:
    """A flag of each kind of range."""

    steps: int = flag(1, "Steps.", minimum=1, on_resume="free")
    weight: float | None = flag(None, "Weight.", above=0, on_resume="free")
    decay: float = flag(0.5, "Decay.", minimum=0, below=1, on_resume="free")
    modules: list[str] = flag([], "Modules.", choices=("attention", "mlp"), on_resume="free")


@pytest.mark.parametrize(
    ("allowed", "text", "inside", "outside"),
    [
        (Range(minimum=1), "at least 1", (1, 2.5), (0, 0.999)),
        (Range(minimum=0), "0 or more", (0, 7), (-1e-9,)),
        (Range(above=0), "positive", (1e-9,), (0, -1)),
        (Range(minimum=0, maximum=1), "between 0 and 1", (0, 1), (-0.1, 1.1)),
        (Range(minimum=0, below=1), "at least 0 and below 1", (0, 0.999), (1,)),
        (Range(above=0, maximum=1), "above 0 and at most 1", (0.5, 1), (0, 1.1)),
    ],
)
def test_ranges(allowed, text, inside, outside):
    assert str(allowed) == text and allowed
    assert all(value in allowed for value in inside) and not any(value in allowed for value in (*outside, math.nan))


def test_an_empty_range_takes_all():
    assert not Range() and -1e300 in Range()


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example(steps=0), "--steps is 0; it must be at least 1"),
        (Example(weight=0.0), "--weight is 0.0; it must be positive"),
        (Example(decay=1.0), "--decay is 1.0; it must be at least 0 and below 1"),
        (Example(modules=["mlp", "moe", "norm"]), "--modules moe norm: choose from attention, mlp"),
    ],
)
def test_values_are_checked_by_their_fields(example, message):
    with pytest.raises(ValueError, match=message):
        check_values(example)


def test_list_defaults_are_copied():
    check_values(Example())
    Example().modules.append("mlp")
    assert Example().modules == []


@pytest.mark.parametrize("arguments", [*SECTIONS.values(), PlanArguments, PrintArguments])
def test_defaults_are_allowed_and_help_is_a_sentence(arguments):
    check_values(arguments())
    for setting in fields(arguments):
        assert Flag.of(setting).help.endswith(".") and not Flag.of(setting).help.startswith("Ours"), setting.name


def test_origins():
    origins = [make(0, "Help.", on_resume="free").metadata["flag"].origin for make in (flag, megatron_flag, original_flag)]
    assert origins == ["new", "megatron", "original"]
