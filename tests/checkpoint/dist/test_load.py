# SPDX-License-Identifier: Apache-2.0
"""Training goes on from a checkpoint bit for bit, on as many ranks as it likes; what does not fit is refused by name."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_bagel.checkpoint.dist.load import load_checkpoint, load_weights_only
from megatron_bagel.checkpoint.dist.saver import Saver
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.load import named_weights
from tests.checkpoint.hf.test_weight_map import tiny_arch
from tests.checkpoint.tiny_run import load_and_train, same, tiny_run, train_and_save, weights
from tests.distributed import run_ranks


@pytest.mark.parametrize("options", [{}, {"distributed_optimizer": False}, {"frozen": "decoder"}], ids=["distributed", "plain", "frozen"])
def test_continuation_equals_the_run_that_was_not_stopped(tmp_path: Path, options: dict) -> None:
    [expected] = run_ranks(train_and_save, 1, tmp_path, options, parallel={})
    [(step, state, got)] = run_ranks(load_and_train, 1, tmp_path / "0000002", options, parallel={})
    assert (step, state) == (2, {"note": 2, "ratio": 0.1})
    assert same(expected, got)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("bf16", "others"), [pytest.param(False, (1, 3), id="fp32"), pytest.param(True, (1,), id="bf16", marks=pytest.mark.slow)]
)
def test_two_ranks_continue_and_another_number_takes_over(tmp_path: Path, bf16: bool, others: tuple[int, ...]) -> None:
    options = {"bf16": bf16}
    expected = run_ranks(train_and_save, 2, tmp_path, options, parallel={})
    assert same(expected[0], expected[1])
    for _, _, got in run_ranks(load_and_train, 2, tmp_path / "0000002", options, parallel={}):
        assert same(expected[0], got)
    stored = run_ranks(load_and_train, 2, tmp_path / "0000002", options, 0, parallel={})[0][2]
    for ranks in others:
        for _, _, got in run_ranks(load_and_train, ranks, tmp_path / "0000002", options, 0, parallel={}):
            assert same(stored, got)


def _load_weights(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    trained = tiny_run(seed=99)
    load_weights_only(folder, trained.modules, trained.arch, kind)
    return weights(trained)


REFUSALS = (
    # changes of the model, options of the run, what the message says (nothing: the checkpoint loads)
    ({"max_latent_size": 8}, {}, ""),  # another resolution only changes a computed table
    ({"llm": {"vocab_size": 48}}, {}, "llm.vocab_size (40 in the checkpoint, 48 in this run)"),
    (
        {"llm": {"layer_module": "Qwen2DecoderLayer"}},
        {},
        "llm.layer_module (Qwen2MoTDecoderLayer in the checkpoint, Qwen2DecoderLayer in this run)",
    ),
    ({}, {"frozen": "vit_model"}, "unexpected ema.vit_model."),
)


def _refusals(folder: Path) -> list[str]:
    """The message with which loading into each other run is refused."""
    messages = []
    for change, options, _ in REFUSALS:
        arch = tiny_arch()
        arch = replace(arch, **{k: v for k, v in change.items() if k != "llm"}, llm=replace(arch.llm, **change.get("llm", {})))
        try:
            load_checkpoint(folder, tiny_run(arch=arch, **options))
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_weights_alone_trained_or_averaged(tmp_path: Path) -> None:
    [saved] = run_ranks(train_and_save, 1, tmp_path, {"frozen": "vit_model"}, 2, 0, parallel={})
    for kind in ("model", "ema"):
        [got] = run_ranks(_load_weights, 1, tmp_path / "0000002", kind, parallel={})
        for name, tensor in got.items():
            expected = saved.get(f"ema.{name}", saved[name]) if kind == "ema" else saved[name]
            assert torch.equal(tensor, expected), name


@pytest.mark.usefixtures("single_rank")
def test_a_part_that_was_not_trained_may_be_missing_by_permission_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run without a vision tower gives its weights to one that has one; what was loaded, left over and missing is said."""
    whole = tiny_arch()
    train_and_save(tmp_path, {"arch": replace(whole, vit=None)}, 1, 0)
    folder, trained = tmp_path / "0000001", tiny_run(arch=whole, seed=99)
    before = weights(trained)
    with pytest.raises(ValueError, match="holds another model; these settings differ: vit"):
        load_weights_only(folder, trained.modules, whole, "ema")
    with pytest.raises(ValueError, match=r"missing .*vit_model"):
        load_weights_only(folder, trained.modules, whole, "ema", allow_missing=["connector.*"])
    with caplog.at_level(logging.INFO):
        load_weights_only(folder, trained.modules, whole, "ema", allow_missing=["connector.*", "vit_model.*"])
    stored = CheckpointWeights(folder)
    for name, tensor in weights(trained).items():
        part, name_there = name.split(".", 1)
        assert torch.equal(tensor, before[name] if part == "vision" else stored.ema(name_there)), name
    tower = [name.removeprefix("vision.") for name in before if name.startswith("vision.")]
    assert f"{len(before) - len(tower)} tensors loaded (ema weights); not used by this model: nothing" in caplog.text
    [line] = [message for message in caplog.messages if "absent and allowed to be" in message]
    assert f"{len(tower)} tensors are absent and allowed to be; they start from their seeded values: {min(tower)}, " in line
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_weights_only(folder, trained.modules, whole, "model", allow_missing=["connector.*", "vit_model.*"])
    assert "(model weights)" in caplog.text and "absent" not in caplog.text, "a start that fills the model twice lists them once"
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load_weights_only(folder, {"decoder": trained.modules["decoder"]}, replace(whole, vit=None))
    assert "(model weights); not used by this model: nothing" in caplog.text


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    run_ranks(train_and_save, 1, tmp_path, {}, 1, 0, parallel={})
    [messages] = run_ranks(_refusals, 1, tmp_path / "0000001", parallel={})
    for message, (_, _, expected) in zip(messages, REFUSALS, strict=True):
        assert expected in message and bool(expected) == bool(message)


def _saved_with_nan(folder: Path, name: str, how: str) -> str:
    """Save a run whose weight ``name`` is NaN, and return the message with which it is refused."""
    trained = tiny_run()
    named_weights(trained.modules.values())[name].data.fill_(float("nan"))
    Saver(folder).save(1, Trained(trained.modules, trained.arch), {})
    fresh = tiny_run(seed=99)
    with pytest.raises(ValueError) as caught:
        if how == "resume":
            load_checkpoint(folder / "0000001", Trained(fresh.modules, fresh.arch))
        elif how == "weights":
            load_weights_only(folder / "0000001", fresh.modules, fresh.arch)
        else:
            CheckpointWeights(folder / "0000001", "sampled").model(name)
    return str(caught.value)


@pytest.mark.parametrize("how", ["resume", "weights", "read"])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, how: str) -> None:
    name = "final_layernorm.und.weight"
    [message] = run_ranks(_saved_with_nan, 1, tmp_path, name, how, parallel={})
    assert f"{tmp_path / '0000001'}: tensor {name} holds NaN or infinite values" in message
