# SPDX-License-Identifier: Apache-2.0
"""FP8 is refused with the reason where it cannot run, and reaches Megatron-Core where it can."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.fp8 import check_fp8_gpu, check_fp8_settings, check_fp8_sizes
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config

LLM = LLMArch(64, 96, 2, 4, 2, 128)
ENGINE: dict[str, Any] = {"fp8": "hybrid", "transformer_impl": "transformer_engine"}


@pytest.mark.parametrize(
    ("flags", "has_gpu", "complaint"),
    [
        (ENGINE, False, "no FP8 products on a CPU"),
        ({"fp8": "e4m3"}, True, "needs --transformer_impl transformer_engine"),
        ({**ENGINE, "bf16": False}, True, "needs --bf16"),
        ({**ENGINE, "first_last_layers_bf16": True}, True, "does not work with --fp8_recipe delayed"),
        ({"first_last_layers_bf16": True}, True, "needs --fp8"),
        ({**ENGINE, "recompute_modules": ["mlp"]}, True, "would update the scales twice"),
    ],
)
def test_settings_that_cannot_work_are_refused(flags: dict[str, Any], has_gpu: bool, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        check_fp8_settings(MegatronArguments(**flags), has_gpu)


@pytest.mark.parametrize(
    ("recipe", "capability", "works"),
    [
        ("delayed", (8, 0), False), ("delayed", (8, 9), True), ("tensorwise", (9, 0), True), ("blockwise", (8, 9), False),
        ("blockwise", (9, 0), True), ("mxfp8", (9, 0), False), ("mxfp8", (10, 0), True), ("mxfp8", None, True),
    ],
)  # fmt: skip
def test_a_recipe_needs_its_gpu(recipe: str, capability: tuple[int, int] | None, works: bool) -> None:
    megatron = MegatronArguments(**{**ENGINE, "fp8_recipe": recipe})
    check_fp8_settings(megatron, True)
    if works:
        check_fp8_gpu(megatron, capability, "a GPU")
        return
    with pytest.raises(ValueError, match=f"{recipe} needs a GPU from .*; a GPU has {capability[0]}.{capability[1]}"):
        check_fp8_gpu(megatron, capability, "a GPU")


def test_sides_that_fp8_products_do_not_take_are_refused() -> None:
    check_fp8_sizes(MegatronArguments(**ENGINE), LLM)
    with pytest.raises(ValueError, match="the MLP width of a rank, 24, is no multiple of 16"):
        check_fp8_sizes(MegatronArguments(**ENGINE, tensor_model_parallel_size=4), LLM)


def test_settings_reach_megatron() -> None:
    flags = {"fp8_recipe": "tensorwise", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 0}
    config = transformer_config(LLM, MegatronArguments(**ENGINE, **flags), bf16=True)
    assert (config.fp8, config.fp8_recipe, config.first_last_layers_bf16) == ("hybrid", "tensorwise", True)
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (1, 0)
    assert transformer_config(LLM, MegatronArguments()).fp8 is None
