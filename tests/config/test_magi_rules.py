# SPDX-License-Identifier: Apache-2.0
"""MagiAttention's kernel is refused with the reason where it cannot run."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.magi_rules import check_magi_machine, check_magi_settings, check_magi_sizes
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parser import parse_config
from megatron_bagel.config.resolve import resolve
from megatron_bagel.config.validate import validate_settings

MAGI = MegatronArguments(attention_backend="magi")


@pytest.mark.parametrize(
    ("words", "has_gpu", "complaint"),
    [
        ("", False, "does not exist on CPU; use auto or sdpa"),
        ("--bf16 False", True, "needs --bf16"),
        ("--use_flex True", True, "contradict each other"),
    ],
)
def test_settings_that_cannot_work_are_refused(words: str, has_gpu: bool, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        validate_settings(parse_config(["--attention_backend", "magi", *words.split()]), 1, has_gpu)


@pytest.mark.parametrize("words", ["", "--use_flex False", "--bf16 True", "--cp_comm_type a2a --recompute_granularity full"])
def test_settings_that_work(words: str) -> None:
    config = parse_config(["--attention_backend", "magi", *words.split()])
    validate_settings(config, 1, has_gpu=True)
    assert resolve(config, 1, has_gpu=True).attention_backend == "magi"


def test_heads() -> None:
    for head_dim, works in ((64, True), (128, True), (80, False), (256, False)):
        llm = LLMArch(4 * head_dim, 96, 2, 4, 2, 128)
        if works:
            check_magi_sizes(MAGI, llm)
            continue
        check_magi_sizes(MegatronArguments(), llm)
        with pytest.raises(ValueError, match=f"have {head_dim} channels, .* 64 or 128; use flex"):
            check_magi_sizes(MAGI, llm)


def test_a_run_needs_hopper_and_the_package_and_a_dry_run_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[Any] = [None]
    monkeypatch.setattr("megatron_bagel.config.magi_rules.find_spec", lambda name: installed[0])
    check_magi_settings(MAGI, True)
    check_magi_machine(MAGI, None, "cpu")
    check_magi_machine(MegatronArguments(), (8, 0), "a GPU")
    for capability in ((8, 0), (10, 0)):
        with pytest.raises(ValueError, match=rf"needs a Hopper GPU .* a GPU has {capability[0]}\.0"):
            check_magi_machine(MAGI, capability, "a GPU")
    with pytest.raises(ValueError, match="needs the package magi_attention, which is installed from its source"):
        check_magi_machine(MAGI, (9, 0), "a GPU")
    installed[0] = object()
    check_magi_machine(MAGI, (9, 0), "a GPU")
