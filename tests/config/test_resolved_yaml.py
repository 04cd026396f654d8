# SPDX-License-Identifier: Apache-2.0
"""``--print_config`` prints YAML that ``--config`` takes, and that says the same when it is printed again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_bagel.cli import plan, train
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.resolved_yaml import resolved_yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize(
    "words",
    [
        "",
        "--lr 2e-5 --train-iters 9 --eps 1e-15 --vit_select_layer -1 --wandb_name x --allow_missing connector.* vit.*",
        "--use_flex True --bf16 --tokenizer_path= --wandb_runid 007",
        "--sharding_strategy NO_SHARD --gradient_accumulation_steps 2 --no_copy_init_moe",
        "--num_replicate 2 --num_shard 4 --tensor_model_parallel_size 1 --profile --profile_ranks 0 3",
        "--tensor_model_parallel_size 2 --global_batch_size 16 --rampup_batch_size 4 4 100 --recompute_granularity selective",
    ],
)
def test_printing_its_own_output_prints_the_same(tmp_path, words, has_gpu):
    config = parse_config(words.split())
    text = resolved_yaml(config, 8, has_gpu)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    again = parse_config(["--config", str(path)])
    assert again == config, "values and what was given"
    assert resolved_yaml(again, 8, has_gpu) == text
    assert Config.from_dict(yaml.safe_load(text)) == config


def test_the_output_describes_runs_of_other_sizes(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(resolved_yaml(parse_config(["--gradient_accumulation_steps", "3"]), 8, has_gpu=True))
    megatron = yaml.safe_load(resolved_yaml(parse_config(["--config", str(path)]), 2, has_gpu=False))["megatron"]
    assert (megatron["global_batch_size"], megatron["bf16"], megatron["attention_backend"]) == (6, False, "sdpa")


def test_derived_settings_are_printed_in_their_places():
    content = yaml.safe_load(resolved_yaml(parse_config(["--global_batch_size", "16", "--sharding_strategy", "NO_SHARD"]), 8, has_gpu=True))
    assert content["training"]["gradient_accumulation_steps"] == 2 and content["training"]["use_wandb"] is False
    megatron = content["megatron"]
    assert megatron["bf16"] is True and megatron["attention_backend"] == "flex" and megatron["use_distributed_optimizer"] is False
    assert content["given"] == ["global_batch_size", "sharding_strategy"]
    assert content["derived"]["bf16"] is True and "global_batch_size" not in content["derived"]


def test_edits_of_the_output_are_taken(tmp_path):
    content = yaml.safe_load(resolved_yaml(parse_config(["--lr", "3"]), 1, has_gpu=False))
    content["training"]["ema"] = 0.5
    content["megatron"]["bf16"] = True  # derived: False
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    config = parse_config(["--config", str(path), "--log_every", "4"])
    assert (config.training.lr, config.training.ema, config.megatron.bf16) == (3.0, 0.5, True)
    assert config.given == {"lr", "ema", "bf16", "log_every"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("given: [lrs]", r"run.yaml: given: there is no flag --lrs; did you mean --lr"),
        ("derived: {bf61: true}", r"run.yaml: derived: there is no flag --bf61; did you mean --bf16"),
        ("derived: [bf16]", r"run.yaml: derived holds settings and their values, not a list"),
    ],
)
def test_unknown_names_are_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config(["--config", str(path)])


def test_the_commands_print_what_their_ranks_resolve(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = ["--tensor_model_parallel_size", "4", "--dataset_config_file", "/nowhere.yaml"]
    assert plan.main([*words, "--gpus", "8", "--print_config"]) == 0
    text = capsys.readouterr().out
    assert text == resolved_yaml(parse_config(words), 8, has_gpu=True)
    assert train.main([*words, "--dry_run", "--fake_world_size", "8", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["megatron"]["global_batch_size"] == 2
    assert train.main([*words, "--print_config"]) == 2
    assert "do not divide the 1 ranks" in capsys.readouterr().err


def test_only_rank_zero_prints(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert train.main(["--print_config"]) == 0 and capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert train.main(["--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["megatron"]["global_batch_size"] == 2


PROGRAM = r"""
import sys
from megatron_bagel.cli.train import main

try:
    code = main(sys.argv[1:])
except SystemExit as left:
    code = left.code
heavy = [name for name in ("torch", "megatron.core") if name in sys.modules]
print(f"\n{code} {heavy}")
"""


@pytest.mark.parametrize(
    ("words", "last"), [(["--help"], "0 []"), (["--lrs", "3"], "2 []"), (["--print_config"], "0 ['torch']")]
)  # fmt: skip
def test_printing_waits_for_no_package_it_does_not_need(words, last):
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.splitlines()[-1] == last, ended.stderr
