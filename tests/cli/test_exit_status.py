# SPDX-License-Identifier: Apache-2.0
"""One rule for every command: 0 if it did what it was asked, 1 if the answer is no, 2 for bad input, which one line names."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_bagel.cli.main import COMMANDS, main

#: Command -> words that ask for something that is not there. {no} is a path where nothing is, {out} one that can be written.
BAD_INPUT = {
    "train": "--dataset_config_file {no} --model_path {no} --finetune_from_hf True --results_dir {out}",
    "plan": "--model_path {no} --finetune_from_hf True --gpus 1",
    "generate": "--model {no} --prompt circle --out {out}",
    "evaluate": "geneval {no} --model {no} --out {out}",
    "quickstart": "{file}",
    "data build": "--dataset_config_file {no} --tokenizer {no} --output {out}",
    "data merge": "{no} --output {out}",
    "data verify": "{no}",
    "data inspect": "{no}",
    "data stats": "{no}",
    "data sample": "{file}",
    "data latents": "{no} --dataset_config_file {no} --vae {no} --output {out}",
    "data tokenizer": "{out} --text {no}",
    "convert hf-to-megatron": "--model {no} --output {out}",
    "convert megatron-to-hf": "--checkpoint {no} --output {out}",
    "convert adapter": "merge --adapter {no} --base {no} --output {out}",
    "convert init": "--llm {no} --output {out}",
    "convert upcycle": "--model {no} --output {out} --num-experts 2 --moe-router-topk 1",
    "convert push": "{no} --to owner/name --license mit",
    "convert inspect": "compare {no} {no}",
}


def status(words: list[str]) -> int | str | None:
    """The status that a process would end with."""
    try:
        return main(words)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_input_ends_with_2(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    words = BAD_INPUT[command].format(no=tmp_path / "nowhere", out=tmp_path / "out", file=file)
    assert status([*command.split(), *words.split()]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"megatron-bagel {command}: ") and str(tmp_path) in lines[-1], lines
