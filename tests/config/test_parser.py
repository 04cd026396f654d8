# SPDX-License-Identifier: Apache-2.0
"""Flags and YAML: the guide's commands, both spellings, prefixes, aliases, precedence, and what is refused."""

from __future__ import annotations

from typing import get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_bagel.config.flag import choices_of, default_of
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.sections import ALIASES, SECTION_OF, SECTIONS, SETTINGS

#: The fine-tuning command of the training guide after its script path; the other command is in test_original_flags.py.
GUIDE_FINE_TUNING = """
--dataset_config_file ./data/configs/example.yaml --model_path $model_path --layer_module Qwen2MoTDecoderLayer --max_latent_size 64
--resume-from $model_path --finetune_from_hf True --auto_resume True --resume-model-only True --finetune-from-ema True --log_every 1
--lr 2e-5 --num_worker 1 --expected_num_tokens 10240 --max_num_tokens 11520 --max_num_tokens_per_sample 10240
"""
GUIDE_PRE_TRAINING = """
--dataset_config_file ./data/configs/example.yaml --llm_path $llm_path --vae_path $vae_path --vit_path $vit_path
--layer_module Qwen2MoTDecoderLayer --use_flex True --resume_from $resume_from --results_dir $output_path --checkpoint_dir $ckpt_path
--max_latent_size 64
"""


@pytest.fixture
def guide_variables(monkeypatch):
    """The variables of the guide's commands, which a shell would have replaced."""
    for name in ("model_path", "llm_path", "vae_path", "vit_path", "resume_from", "output_path", "ckpt_path"):
        monkeypatch.setenv(name, f"/hub/{name}")


def test_the_guides_fine_tuning_command(guide_variables):
    config = parse_config(GUIDE_FINE_TUNING.split())
    assert config.data.num_workers == 1 and config.training.lr == 2e-5 and config.training.resume_from == "/hub/model_path"
    assert config.training.finetune_from_ema and config.training.resume_model_only and config.data.max_num_tokens == 11520
    assert "num_workers" in config.given and "num_shard" not in config.given


def test_the_guides_pre_training_command(guide_variables):
    config = parse_config(GUIDE_PRE_TRAINING.split())
    assert config.training.use_flex and config.training.checkpoint_dir == "/hub/ckpt_path" and config.model.max_latent_size == 64


HINTS = {name: hint for arguments in SECTIONS.values() for name, hint in get_type_hints(arguments).items()}


@pytest.mark.parametrize("name", sorted(SECTION_OF))
def test_both_spellings_of_every_flag(name, tmp_path):
    default, hint = default_of(SETTINGS[name]), HINTS[name]
    choices = [choice for choice in choices_of(SETTINGS[name], hint) if choice != default]
    word = choices[0] if choices else str(default is not True) if hint in (bool, bool | None) else "7"
    results = [parse_config([flag, word]).value_of(name) for flag in (f"--{name}", f"--{name.replace('_', '-')}")]
    assert results[0] == results[1] != default
    path = tmp_path / "config.yaml"
    path.write_text(f"{name}: {[word] if isinstance(default, list) else word}\n")
    assert parse_config(["--config", str(path)]).value_of(name) == results[0]


@pytest.mark.parametrize(("alias", "name"), sorted(ALIASES.items()))
def test_aliases_set_the_originals_setting(alias, name):
    word = {"lr_scheduler": "cosine"}.get(name, "3")
    for flag in (f"--{alias}", f"--{alias.replace('_', '-')}"):
        config = parse_config([flag, word])
        assert str(config.value_of(name)).removesuffix(".0") == word and name in config.given


def test_booleans_take_words_or_stand_bare():
    assert parse_config(["--use-distributed-optimizer", "--bf16", "--visual_und", "false"]).training.visual_und is False
    assert parse_config(["--bf16"]).megatron.bf16 is True and parse_config([]).megatron.bf16 is None
    assert parse_config(["--no_copy_init_moe"]).training.copy_init_moe is False


def test_flags_override_the_file_and_both_override_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    # 1e-4 without a point is a string to YAML 1.1; the flag's own conversion reads it.
    path.write_text("training:\n  lr: 1e-5\n  total-steps: 7\nmodel:\n  vit_select_layer: -1\nsave_every: 3\nresume_from: null\n")
    config = parse_config(["--config", str(path), "--train-iters", "9"])
    assert (config.training.lr, config.training.total_steps, config.training.save_every) == (1e-5, 9, 3)
    assert config.model.vit_select_layer == -1 and config.training.warmup_steps == 2000 and config.training.resume_from is None


@pytest.mark.parametrize("words", [["--ema", "auto"], ["--ema=auto"], []])
def test_an_automatic_average_is_the_default_decay_that_warms_up(words, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("ema: 0.5\n" if words else "ema: auto\n")
    training = parse_config(["--config", str(path), *words]).training
    assert (training.ema, training.ema_warmup) == (0.9999, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_latent_sizes", "3"], r"no flag --max_latent_sizes; did you mean --max_latent_size"),
        (["--cpu-offloading-num-layers", "2"], r"no flag --cpu_offloading_num_layers: .*--recompute_granularity full"),
        (["--tensor-parallel-size", "2"], r"did you mean --tensor_model_parallel_size"),
        (["--ema", "auto", "--ema_warmup", "False"], r"--ema auto warms up, and --ema_warmup False says not to"),
        (["--xyzzy", "2"], r"no flag --xyzzy; see --help"),
        (["stray"], r"'stray' belongs to no flag"),
        (["--lr", "fast"], r"--lr: invalid float value: 'fast'"),
        (["--layer_module", "Qwen3"], r"invalid choice: 'Qwen3' \(choose from"),
        (["--max", "3"], r"ambiguous option"),
        (["--train_iters", "3", "--total_steps", "4"], r"--train_iters 3 and --total_steps 4 are one setting"),
        (["--config", "/nowhere.yaml"], r"no file /nowhere.yaml"),
    ],
)
def test_refused_on_the_command_line(words, message):
    with pytest.raises(ValueError, match=message):
        parse_config(words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 3", r"run.yaml: there is no flag --learning_rat"),
        ("training:\n  lrs: 3", r"no flag --lrs; did you mean --lr"),
        ("lr: fast", r"run.yaml: argument --lr: invalid float"),
        ("lr: null", r"lr has no value"),
        ("lr: 1.0\ntraining:\n  lr: 2.0", r"lr is set twice"),
        ("seed: 1\nglobal_seed: 2", r"--seed 1 and --global_seed 2 are one setting"),
        ("optimizer:\n  lr: 1.0", r"optimizer holds a group of settings; groups are model, data, training, megatron"),
        ("- lr", r"expected keys and values, found a list"),
        ("lr: [", r"not valid YAML"),
    ],
)
def test_refused_in_the_file(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_config(["--config", str(path)])


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as left:
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0 and "(default: 36864)" in " ".join(text.split())
    assert all(f"--{name}" in text for name in SECTION_OF) and all(f"--{alias}" in text for alias in ALIASES)


_TEXT = st.text("abc/_- .", min_size=1).filter(lambda text: text != "--")
_WORDS = {int: st.integers(1, 10**6), float: st.floats(1e-20, 1e6), bool: st.booleans(), str: _TEXT}
_SETTINGS = {name: _WORDS[hint] for name, hint in HINTS.items() if hint in _WORDS}


@settings(max_examples=25, deadline=None)
@given(st.fixed_dictionaries({}, optional=_SETTINGS))
def test_saved_configurations_read_back_equal(tmp_path_factory, values):
    config = Config.from_values(values)
    assert len(_SETTINGS) > 70
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    config.save(path)
    assert parse_config(["--config", str(path)]) == config
    assert Config.from_dict(yaml.safe_load(path.read_text())) == config
