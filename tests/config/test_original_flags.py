# SPDX-License-Identifier: Apache-2.0
"""The flags of the original are complete, docs/flags.md says what is true of the code, and every earlier flag still exists."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from megatron_bagel.config.flag import Flag, default_of
from megatron_bagel.config.flag_table import DOCUMENT, flag_table
from megatron_bagel.config.original_flags import AS_IS
from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.sections import ALIASES, SECTION_OF, SECTIONS, SETTINGS
from megatron_bagel.config.validate import refuse_unsupported_values

#: Names and defaults of the original's three dataclasses, as its parser has them.
ORIGINAL = {
    "model_path": "hf/BAGEL-7B-MoT", "llm_path": "hf/Qwen2.5-0.5B-Instruct/", "llm_qk_norm": True, "tie_word_embeddings": False,
    "layer_module": "Qwen2MoTDecoderLayer", "vae_path": "flux/vae/ae.safetensors", "max_latent_size": 32, "latent_patch_size": 2,
    "vit_path": "hf/siglip-so400m-14-980-flash-attn2-navit/", "vit_patch_size": 14, "vit_max_num_patch_per_side": 70,
    "connector_act": "gelu_pytorch_tanh", "interpolate_pos": False, "vit_select_layer": -2, "vit_rope": False,
    "text_cond_dropout_prob": 0.1, "vae_cond_dropout_prob": 0.3, "vit_cond_dropout_prob": 0.3,
    "dataset_config_file": "data/configs/example.yaml", "prefetch_factor": 2, "num_workers": 4, "max_num_tokens_per_sample": 16384,
    "max_num_tokens": 36864, "prefer_buffer_before": 16384, "max_buffer_size": 50, "data_seed": 42,
    "visual_gen": True, "visual_und": True, "results_dir": "results", "checkpoint_dir": "results/checkpoints", "wandb_project": "bagel",
    "wandb_name": "run", "wandb_runid": "0", "wandb_resume": "allow", "wandb_offline": False, "global_seed": 4396, "auto_resume": False,
    "resume_from": None, "resume_model_only": False, "finetune_from_ema": False, "finetune_from_hf": False, "log_every": 10,
    "save_every": 2000, "total_steps": 500000, "warmup_steps": 2000, "lr_scheduler": "constant", "lr": 1e-4, "min_lr": 1e-7,
    "beta1": 0.9, "beta2": 0.95, "eps": 1e-15, "ema": 0.9999, "max_grad_norm": 1.0, "timestep_shift": 1.0, "mse_weight": 1.0,
    "ce_weight": 1.0, "ce_loss_reweighting": False, "expected_num_tokens": 32768, "gradient_accumulation_steps": 1,
    "peak_device_tflops": 0.0, "num_replicate": 1, "num_shard": 8, "sharding_strategy": "HYBRID_SHARD",
    "backward_prefetch": "BACKWARD_PRE", "cpu_offload": False, "freeze_llm": False, "freeze_vit": False, "freeze_vae": True,
    "freeze_und": False, "copy_init_moe": True, "use_flex": False,
}  # fmt: skip


REFUSED = [name for name, setting in SETTINGS.items() if Flag.of(setting).compatibility.kind == "refused"]


def test_every_original_flag_with_its_default():
    defaults = {name: default_of(setting) for name, setting in SETTINGS.items() if Flag.of(setting).origin == "original"}
    assert defaults == ORIGINAL


def test_names_are_unique():
    assert len(SETTINGS) == sum(len(fields(arguments)) for arguments in SECTIONS.values())
    aliases = [alias for setting in SETTINGS.values() for alias in Flag.of(setting).aliases]
    assert len(set(aliases)) == len(aliases) and not set(aliases) & set(SETTINGS)


def test_only_flags_of_the_original_can_be_compatible_with_it():
    assert all(rules.origin == "original" for rules in map(Flag.of, SETTINGS.values()) if rules.compatibility != AS_IS)


def test_every_earlier_flag_and_alias_has_its_meaning_and_default():
    """earlier_flags.tsv holds the flags of an earlier release with their defaults, and the aliases with what they stand for."""
    rows = [line.split("\t") for line in (Path(__file__).parent / "earlier_flags.tsv").read_text(encoding="utf-8").splitlines()]
    aliases = {name: text.removeprefix("--") for name, text in rows if text.startswith("--")}
    assert len(rows) == 157 and len(aliases) == 12 and aliases == {alias: ALIASES.get(alias) for alias in aliases}
    for name, text in rows:
        if name in aliases:
            continue
        default = default_of(SETTINGS[name])
        assert ("–" if default in (None, []) else str(default)) == text, name
        if text != "–" and not isinstance(default, list):
            config = parse_config([f"--{name}={text}"])
            assert config.value_of(name) == default and config.given == {name}


def test_defaults_are_never_refused():
    refuse_unsupported_values(Config())


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_table_calls_refused_is_refused(name):
    config = Config()
    value = getattr(config.training, name)
    setattr(config.training, name, "NO_PREFETCH" if isinstance(value, str) else not value)
    with pytest.raises(ValueError, match=f"--{name}"):
        refuse_unsupported_values(config)


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == flag_table(), "run python -m megatron_bagel.config.flag_table"


#: Refused whatever value other than the default is given, so nothing else reads them.
_REFUSED = {"micro_batch_size": 2}


@pytest.mark.parametrize(("name", "value"), _REFUSED.items())
def test_flags_that_nothing_reads_are_refused(name, value):
    config = Config.from_values({name: value})
    with pytest.raises(ValueError, match=f"--{name}"):
        refuse_unsupported_values(config)


def test_every_other_flag_is_read_by_something():
    """No flag is parsed and then ignored: each is read as an attribute, or named in a list of settings, outside its definition."""
    package = Path(DOCUMENT).parents[1] / "megatron_bagel"
    defining = {"arguments.py", "megatron_arguments.py", "observing_arguments.py", "resilience_arguments.py", "original_flags.py"}
    defining |= {"validate.py", "flag_rules.py", "required_paths.py", "resolved_yaml.py"}
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name not in defining)
    refused = {*REFUSED, *_REFUSED}
    unread = [name for name in SECTION_OF if name not in refused and not re.search(rf"\.{name}\b|\"{name}\"", code)]
    assert not unread
