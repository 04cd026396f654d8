# SPDX-License-Identifier: Apache-2.0
"""Shapes of a model: read from and written to the released folder's JSON, and refused where they contradict each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch

LLM = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64)
VIT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=112)


def test_the_released_files_come_back_as_they_were(goldens):
    arch = BagelArch.from_hf_folder(goldens / "hf")
    for name, ours in (("llm_config", arch.llm.to_hf()), ("vit_config", arch.vit.to_hf())):
        assert ours == json.loads((goldens / "hf" / f"{name}.json").read_text())
    top = json.loads((goldens / "hf" / "config.json").read_text())
    assert arch.to_hf() == {**top, "vit_select_layer": -2, "vit_rope": False}
    again = BagelArch.from_dict(json.loads(json.dumps(arch.to_dict())))
    assert again == arch and again.llm.to_hf() == arch.llm.to_hf()
    extra = json.loads((goldens / "hf" / "tiny_extra.json").read_text())
    assert AutoencoderArch.from_dict(extra["ae"]).to_dict() == extra["ae"]


def test_a_plain_qwen2_folder_takes_experts_from_flags():
    assert LLMArch.from_hf(LLM).layer_module == "Qwen2DecoderLayer" and not LLMArch.from_hf(LLM).qk_norm
    arch = LLMArch.from_hf(LLM, layer_module="Qwen2MoTDecoderLayer", qk_norm=True)
    assert arch.has_gen_attention and arch.has_gen_mlp and arch.qk_norm and arch.head_dim == 8
    moe = LLMArch.from_hf(LLM, layer_module="Qwen2MoEDecoderLayer")
    assert moe.has_gen_mlp and not moe.has_gen_attention


def test_rope_theta_of_either_transformers_release():
    assert LLMArch.from_hf({**LLM, "rope_theta": 5e5}).rope_theta == 5e5
    assert LLMArch.from_hf({**LLM, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}).rope_theta == 5e5


@pytest.mark.parametrize("parts", [{}, {"vit": ViTArch(**VIT)}, {"autoencoder": AutoencoderArch(ch=32, ch_mult=(1, 2))}])
def test_any_combination_of_parts_survives_a_round_trip(parts):
    arch = BagelArch(LLMArch(**LLM), vit_max_num_patch_per_side=8, **parts)
    assert BagelArch.from_dict(json.loads(json.dumps(arch.to_dict()))) == arch


@pytest.mark.parametrize(("select", "layers"), [(-1, 3), (-2, 2), (1, 1)])
def test_vit_layers(select, layers):
    assert BagelArch(LLMArch(**LLM), ViTArch(**VIT), vit_max_num_patch_per_side=8, vit_select_layer=select).n_vit_layers == layers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LLMArch.from_hf({"hidden_size": 32}), r"LLM config lacks intermediate_size, .*vocab_size"),
        (lambda: LLMArch.from_hf({**LLM, "rope_scaling": {"type": "yarn"}}), r"rope scaling"),
        (lambda: LLMArch.from_hf({**LLM, "hidden_act": "gelu"}), r"hidden_act 'gelu'"),
        (lambda: LLMArch(**{**LLM, "layer_module": "Qwen3"}), r"layer_module 'Qwen3' is not one of"),
        (lambda: LLMArch(**{**LLM, "num_attention_heads": 5}), r"not a multiple of num_attention_heads 5"),
        (lambda: LLMArch(**{**LLM, "num_key_value_heads": 3}), r"not a multiple of num_key_value_heads 3"),
        (lambda: ViTArch.from_hf({"hidden_size": 16}), r"ViT config lacks"),
        (lambda: ViTArch(**{**VIT, "hidden_act": "relu"}), r"hidden_act 'relu'"),
        (lambda: AutoencoderArch(ch=48), r"multiple of 32"),
        (lambda: AutoencoderArch.from_dict({"channels": 3}), r"unknown keys channels"),
        (lambda: AutoencoderArch.from_dict({"downsample": 4}), r"says downsample 4; .* gives 8"),
        (lambda: BagelArch(LLMArch(**LLM), ViTArch(**VIT)), r"grid of side 8 .*set --vit_max_num_patch_per_side 8"),
        (lambda: BagelArch(LLMArch(**LLM), ViTArch(**VIT), vit_max_num_patch_per_side=8, vit_select_layer=-9), r"leaves -5 layers"),
        (lambda: BagelArch(LLMArch(**LLM), connector_act="relu"), r"connector_act 'relu'"),
        (lambda: BagelArch(LLMArch(**LLM), timestep_shift=0), r"timestep_shift is 0"),
        (lambda: BagelArch.from_hf_folder("/nowhere"), r"/nowhere does not exist"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_broken_json_is_named(tmp_path):
    (tmp_path / "llm_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"llm_config.json is not valid JSON"):
        BagelArch.from_hf_folder(tmp_path)
    (tmp_path / "llm_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"holds a list"):
        BagelArch.from_hf_folder(tmp_path)


def test_head_size_of_qwen3_counts_and_of_qwen2_does_not():
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=40, head_dim=32)
    qwen2, qwen3 = (LLMArch.from_hf({**sizes, "model_type": kind}) for kind in ("qwen2", "qwen3"))
    assert (qwen2.head_dim, qwen3.head_dim) == (16, 32)
    assert LLMArch.from_hf(qwen3.to_hf()) == qwen3 and qwen3.to_hf()["head_dim"] == 32
    assert qwen2.to_hf()["head_dim"] == 32  # as it was read


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("llm_config.json", {"num_attention_heads": 0}, "LLM config has num_attention_heads 0"),
        ("llm_config.json", {"rope_parameters": [1]}, "wrong type"),
        ("vit_config.json", {"vision_config": 3}, "wrong type"),
        ("ae_config.json", {"ch_mult": 3}, "wrong type"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(goldens, tmp_path, file, changes, reason):
    folder = Path(shutil.copytree(goldens / "hf", tmp_path / "hf"))
    content = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    (folder / file).write_text(json.dumps({**content, **changes}))
    (folder / "ae.safetensors").touch()
    with pytest.raises(ValueError, match=reason) as caught:
        BagelArch.from_hf_folder(folder)
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, "two", 1.5, True])
def test_sizes_that_cannot_be_are_refused_by_name(key: str, value: object) -> None:
    config = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
    with pytest.raises(ValueError, match=f"LLM config has {key} {value!r}; it must be a whole number of at least 1"):
        LLMArch.from_hf({**config, key: value})
    if key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        with pytest.raises(ValueError, match=f"ViT config has {key} {value!r}"):
            ViTArch.from_hf({**config, key: value})
