# SPDX-License-Identifier: Apache-2.0
"""The model card states what the weights are and how they came about, and nothing of the machine they were made on."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.model_card import CardFacts, card_text, published_flags


def test_the_card_holds_steps_losses_flags_and_a_licence_to_fill_in(goldens: Path) -> None:
    flags = {"lr": 0.5, "global_seed": 4396, "results_dir": "/home/person/results", "wandb_name": "secret", "not_a_flag": 3}
    text = card_text(HFFolder(goldens / "hf").arch, ["ema"], ["it is small"], CardFacts(120, flags, {"ce": 1.25}))
    front = yaml.safe_load(text.split("---")[1])
    assert (front["license"], front["license_name"]) == ("other", "unknown")
    for row in ("| training steps | 120 |", "| ce | 1.25 |", "| cannot be served by vllm-omni | it is small |", "--lr 0.5\n"):
        assert row in text
    for private in ("person", "secret", "global_seed", "not_a_flag"):
        assert private not in text
    assert published_flags(flags) == {"lr": 0.5}


def test_what_is_unknown_is_left_out(goldens: Path) -> None:
    text = card_text(HFFolder(goldens / "hf").arch, ["ema", "model"], [], CardFacts())
    assert "`model`: the trained weights themselves" in text
    assert not [word for word in ("training steps", "Flags of the run", "cannot be served") if word in text]
