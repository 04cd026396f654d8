"""The table of the original's flags is complete, says what is true of the code, and docs/flags.md is made from it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_bagel.config.flag_table import DOCUMENT, flag_table
from megatron_bagel.config.original_flags import ALIASES, ORIGINAL_FLAGS, OURS
from megatron_bagel.config.parser import SECTION_OF, Config
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


def test_every_original_flag_with_its_default():
    assert set(ORIGINAL_FLAGS) == set(ORIGINAL)
    config = Config()
    assert {name: getattr(getattr(config, SECTION_OF[name]), name) for name in ORIGINAL} == ORIGINAL


def test_ours_and_aliases_name_existing_settings():
    assert set(SECTION_OF) >= OURS and not OURS & set(ORIGINAL)
    assert set(ALIASES.values()) <= set(SECTION_OF) and not set(ALIASES) & set(SECTION_OF)


def test_defaults_are_never_refused():
    refuse_unsupported_values(Config())


@pytest.mark.parametrize("name", [name for name, fate in ORIGINAL_FLAGS.items() if fate.fate == "refused"])
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
    defining = {"arguments.py", "megatron_arguments.py", "original_flags.py", "validate.py"}
    code = "\n".join(path.read_text() for path in package.rglob("*.py") if path.name not in defining)
    refused = {name for name, fate in ORIGINAL_FLAGS.items() if fate.fate == "refused"} | set(_REFUSED)
    unread = [name for name in SECTION_OF if name not in refused and not re.search(rf"\.{name}\b|\"{name}\"", code)]
    assert not unread
