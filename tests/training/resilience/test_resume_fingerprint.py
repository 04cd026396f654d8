# SPDX-License-Identifier: Apache-2.0
"""A resume compares settings, data and tokenizer: what must match refuses it, what may change is said, the rest is free."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest

from megatron_bagel.config.flag import FREE, MUST_MATCH, SAID, Flag, OnResume
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import resolve
from megatron_bagel.config.sections import SETTINGS
from megatron_bagel.training.resilience.resume_fingerprint import FINGERPRINT, differences, run_fingerprint, saved_fingerprint

DATA: dict[str, Any] = {
    "t2i_pretrain": {"datasets": [["t2i_pretrain/a", 200, "aa"], ["t2i_pretrain/b", 200, "bb"]], "settings": {"weight": 1.0}}
}


def fingerprint(ranks: int = 1, data: dict[str, Any] = DATA, tokenizer: str = "t", **flags: Any) -> dict[str, Any]:
    config = Config.from_values(flags)
    return run_fingerprint(config.to_dict(), resolve(config, ranks, has_gpu=False), tokenizer, data)


def compared(ranks: int = 1, **changes: Any) -> tuple[list[str], list[str]]:
    found = differences(fingerprint(), fingerprint(ranks, **changes))
    return found.refused, found.said


@pytest.mark.parametrize("name", SETTINGS)
def test_every_flag_has_a_class(name: str) -> None:
    assert Flag.of(SETTINGS[name]).on_resume in get_args(OnResume)


def test_the_same_run_has_no_differences() -> None:
    assert compared() == ([], [])


@pytest.mark.parametrize(
    ("flag", "value"),
    [("global_seed", 77), ("layer_module", "Qwen2MoEDecoderLayer"), ("freeze_vit", True), ("use_distributed_optimizer", False)],
)
def test_what_must_match_refuses_and_names_its_flag(flag: str, value: Any) -> None:
    refused, said = compared(**{flag: value})
    assert len(refused) == 1 and refused[0].startswith(f"--{flag} is {value}, and ") and said == []


def test_a_strategy_that_turns_the_distributed_optimizer_off_names_that_flag() -> None:
    assert compared(sharding_strategy="NO_SHARD")[0] == ["--use_distributed_optimizer is False, and True in the checkpoint"]


@pytest.mark.parametrize(
    ("flag", "value"),
    [("lr", 3e-4), ("ce_weight", 0.5), ("ema", 0.99), ("max_latent_size", 64), ("bf16", True), ("global_batch_size", 4),
     ("total_steps", 7), ("text_cond_dropout_prob", 0.5), ("data_seed", 1)],
)  # fmt: skip
def test_what_may_change_is_said(flag: str, value: Any) -> None:
    refused, said = compared(**{flag: value})
    assert refused == [] and len(said) == 1 and said[0].startswith(f"--{flag} is {value}, and ")


def test_the_batch_that_grows_with_the_ranks_is_said_and_an_equal_one_is_not() -> None:
    assert compared(2) == ([], ["--global_batch_size is 2, and 1 in the checkpoint"])
    assert differences(fingerprint(gradient_accumulation_steps=2), fingerprint(2)).said == []


def test_free_settings_change_without_a_word() -> None:
    free = [name for name, setting in SETTINGS.items() if Flag.of(setting).on_resume == FREE]
    assert {"num_workers", "log_every", "results_dir", "tensor_model_parallel_size"} <= set(free)
    assert compared(num_workers=0, log_every=1, results_dir="elsewhere", index_dir="moved", save_every=3) == ([], [])


@pytest.mark.parametrize(
    "datasets",
    [
        [["t2i_pretrain/b", 200, "bb"], ["t2i_pretrain/a", 200, "aa"]],
        [["t2i_pretrain/a", 200, "aa"], ["t2i_pretrain/c", 200, "cc"]],
        [["t2i_pretrain/a", 100, "ax"], ["t2i_pretrain/b", 300, "bx"]],
    ],
)
def test_datasets_in_another_order_or_others_are_refused_unless_the_group_restarts(datasets: list[list[Any]]) -> None:
    data = {"t2i_pretrain": {**DATA["t2i_pretrain"], "datasets": datasets}}
    refused, _ = compared(data=data)
    assert len(refused) == 1 and "resume_data_status: False" in refused[0] and "a (200), b (200) in the checkpoint" in refused[0]
    assert differences(fingerprint(), fingerprint(data=data), ["t2i_pretrain"]).refused == []


def test_other_content_and_group_settings_are_said() -> None:
    data = copy.deepcopy(DATA)
    data["t2i_pretrain"]["datasets"][0][2], data["t2i_pretrain"]["settings"]["weight"] = "other", 2.0
    assert compared(data=data) == (
        [],
        [
            "dataset t2i_pretrain/a has another content than in the checkpoint",
            "dataset group 't2i_pretrain': weight is 2.0, and 1.0 in the checkpoint",
        ],
    )


def test_a_schedule_and_a_limit_of_epochs_are_said_in_words() -> None:
    """Also where one side has none, and its fingerprint does not name them."""
    plain, changing = copy.deepcopy(DATA), copy.deepcopy(DATA)
    plain["t2i_pretrain"]["settings"]["weight"] = 4.0
    changing["t2i_pretrain"]["settings"] |= {"weight": 4.0, "weight_points": [[0, 4.0], [50, 1.5]], "max_epochs": [2]}
    weight, epochs = "4 at step 0, 1.5 from step 50 on", "max_epochs is"
    group = "dataset group 't2i_pretrain'"
    for saved, current, told in (
        (plain, changing, [f"weight is {weight}, and 4.0 in the checkpoint", f"{epochs} [2], and not given in the checkpoint"]),
        (changing, plain, [f"weight is 4.0, and {weight} in the checkpoint", f"{epochs} not given, and [2] in the checkpoint"]),
        (changing, changing, []),
    ):
        found = differences(fingerprint(data=saved), fingerprint(data=current))
        assert (found.refused, found.said) == ([], [f"{group}: {sentence}" for sentence in told])


def test_groups_that_come_or_go_are_left_to_the_planner() -> None:
    assert compared(data={**DATA, "text": {"datasets": [["text/x", 1, "x"]], "settings": {}}}) == ([], [])
    assert compared(data={}) == ([], [])


def test_another_tokenizer_is_refused() -> None:
    assert compared(tokenizer="other")[0] == ["the tokenizer (--tokenizer_path) gives other ids than the checkpoint's"]


def test_a_checkpoint_of_an_earlier_version_is_compared_by_its_flags() -> None:
    record = Config.from_values({"lr": 3e-4, "global_seed": 5}).to_dict()
    record["training"]["a_flag_that_is_gone"] = 1
    del record["training"]["ema"]
    found = differences(saved_fingerprint({"config": record}), fingerprint(ema=0.5))
    assert found.refused == ["--global_seed is 4396, and 5 in the checkpoint"]
    assert found.said == ["--lr is 0.0001, and 0.0003 in the checkpoint"]
    assert differences(saved_fingerprint({}), fingerprint()).refused == []


def test_what_was_in_effect_is_unknown_where_an_earlier_version_did_not_keep_it() -> None:
    saved = saved_fingerprint({"config": Config.from_values({"sharding_strategy": "NO_SHARD"}).to_dict()})["settings"]
    assert not {"bf16", "global_batch_size", "attention_backend"} & saved.keys() and saved["use_distributed_optimizer"] is False
    assert saved_fingerprint({FINGERPRINT: {"settings": {"bf16": True}}}) == {"settings": {"bf16": True}}


def test_the_classes_are_what_they_are_for() -> None:
    by_class = {kind: {name for name, setting in SETTINGS.items() if Flag.of(setting).on_resume == kind} for kind in get_args(OnResume)}
    assert {"tie_word_embeddings", "visual_gen"} <= by_class[MUST_MATCH] and {"lr", "bf16", "ema"} <= by_class[SAID]
