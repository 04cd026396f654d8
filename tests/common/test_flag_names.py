# SPDX-License-Identifier: Apache-2.0
"""A flag that is misspelt is answered with the one that was meant, by every command and in the command's own spelling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from megatron_bagel.cli import evaluate, generate
from megatron_bagel.cli.convert import adapter, hf_to_megatron, init_from_pretrained, inspect_checkpoint, megatron_to_hf, push, upcycle
from megatron_bagel.cli.data import build, inspect, latents, merge, sample, stats, tokenizer, verify
from megatron_bagel.common.flag_names import unknown_flag

COMMANDS: list[tuple[Callable[[Sequence[str]], Any], str, str]] = [
    (build.main, "--dataset_config_file d --tokenizer t --output o --max_text_bites 5", "--max_text_bites; did you mean --max_text_bytes"),
    (inspect.main, "index --datset d", "did you mean --dataset"),
    (latents.main, "index --dataset_config_file d --vae v --output o --d_type fp32", "did you mean --dtype"),
    (merge.main, "part --output o --over_write", "did you mean --overwrite"),
    (sample.main, "out --edits 3", "did you mean --edit"),
    (stats.main, "index --pack_s 2", "did you mean --packs"),
    (tokenizer.main, "out --text t --vocabulary-size 3", "did you mean --vocab-size"),
    (verify.main, "index --worker_s 2", "did you mean --workers"),
    (adapter.main, "export --checkpoint c --output o --d_type fp32", "did you mean --dtype"),
    (hf_to_megatron.main, "--model m --output o --weight_s ema", "did you mean --weights"),
    (init_from_pretrained.main, "--llm l --output o --vitt v", "did you mean --vit"),
    (inspect_checkpoint.main, "show folder --tensor_s", "did you mean --tensors"),
    (megatron_to_hf.main, "--checkpoint c --output o --d_type fp32", "did you mean --dtype"),
    (push.main, "folder --to a/b --license mit --licence-name x", "did you mean --license-name"),
    (upcycle.main, "--model m --output o --num-experts 2 --moe-router-topk 1 --moe_kind_s und", "did you mean --moe-kinds"),
    (generate.main, "--model m --promt a", "no flag --promt; did you mean --prompt"),
    (evaluate.main, "geneval f --model m --num_sample_s 2", "did you mean --num-samples"),
]  # fmt: skip
NAMES = [command.__module__.rpartition(".")[2] for command, _, _ in COMMANDS]


@pytest.mark.parametrize(
    ("command", "words", "expected"), COMMANDS, ids=[command.__module__.rpartition(".")[2] for command, _, _ in COMMANDS]
)
def test_a_misspelt_flag_is_answered_with_the_right_one(
    command: Callable[[Sequence[str]], Any], words: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        command(words.split())
    error = capsys.readouterr().err.splitlines()[-1]
    assert leaving.value.code == 2 and "there is no flag --" in error and expected in error


def test_what_resembles_nothing_points_to_the_help() -> None:
    assert unknown_flag("--zzzz", ["--workers"]) == "there is no flag --zzzz; see --help"
    assert unknown_flag("loose", ["--workers"]) == "'loose' belongs to no flag"
    assert unknown_flag("--learning-rate=3", ["--lr"], {"learning_rate": "lr"}) == "there is no flag --learning_rate; did you mean --lr?"
