# SPDX-License-Identifier: Apache-2.0
"""The model card states what the weights are and how they came about, and nothing of the machine they were made on."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.model_card import CardFacts, card_text, published_flags, with_licence
from megatron_bagel.config.architecture import BagelArch, LLMArch


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


def test_the_card_names_data_and_base_models() -> None:
    commit = "0a" * 20
    models = [f"owner/a@{commit}", f"owner/a@{commit}"]
    facts = CardFacts(5, datasets={"t2i": 1200, "edit": 8}, samples=96, tokens=12345, base_models=models)
    text = card_text(BagelArch(LLMArch(8, 16, 1, 2, 1, 32)), ["ema"], [], facts)
    assert yaml.safe_load(text.split("---")[1])["base_model"] == ["owner/a"]
    for row in (
        f"| started from | owner/a@{commit} |",
        "| dataset groups | t2i (1,200 samples), edit (8 samples) |",
        "| trained on | 96 samples, 12,345 tokens |",
    ):
        assert row in text


def test_a_licence_replaces_the_one_to_fill_in(goldens: Path) -> None:
    card = card_text(HFFolder(goldens / "hf").arch, ["ema"], [], CardFacts())
    text = with_licence(card, "apache-2.0")
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"license": "apache-2.0", "library_name": "megatron_bagel", "pipeline_tag": "any-to-any"}
    assert "Replace the fields" in card and "Replace the fields" not in text and text.count("| weights |") == 1
    other = with_licence(text, "other", 'My "own" terms', "https://example.org/terms")
    front = yaml.safe_load(other.split("---")[1])
    assert (front["license"], front["license_name"], front["license_link"]) == ("other", 'My "own" terms', "https://example.org/terms")
    with pytest.raises(ValueError, match="does not begin with fields"):
        with_licence("# Model", "apache-2.0")
