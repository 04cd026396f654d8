# SPDX-License-Identifier: Apache-2.0
"""An exported folder has every file that each reader of such folders asks for, and transformers reads those that are its own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_bagel.checkpoint.hf.folder import HFFolder, write_folder
from megatron_bagel.checkpoint.hf.settings_files import preprocessor_config, token_ids, write_generation_config
from tests.checkpoint.hf.exported import export

#: What each reader opens, from its source: the original's app, vllm-omni 0.30.0's two stages, this package.
READERS = {
    "the original": {"llm_config.json", "vit_config.json", "ae.safetensors", "ema.safetensors", "vocab.json", "merges.txt"},
    "vllm-omni": {
        "config.json", "llm_config.json", "vit_config.json", "preprocessor_config.json", "generation_config.json",
        "model.safetensors.index.json", "ema.safetensors", "ae.safetensors", "tokenizer.json", "tokenizer_config.json",
    },
    "megatron_bagel": {"config.json", "llm_config.json", "vit_config.json", "ema.safetensors", "ae.safetensors", "tokenizer.json"},
    "a person": {"README.md", "vae_config.json"},
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(goldens, tmp_path_factory.mktemp("exported") / "out")


def test_the_files_are_those_that_readers_ask_for(exported: Path) -> None:
    assert {path.name for path in exported.iterdir()} == set().union(*READERS.values())


def test_the_configs_say_what_servers_read(exported: Path, goldens: Path) -> None:
    top = json.loads((exported / "config.json").read_text())
    assert (top["architectures"], top["model_type"]) == (["BagelForConditionalGeneration"], "bagel")
    assert (top["latent_patch_size"], top["max_latent_size"], top["vit_max_num_patch_per_side"]) == (2, 16, 16)
    assert top["vae_config"] == {"z_channels": 16, "downsample": 8}
    for section in ("llm_config", "vit_config"):
        assert top[section] == json.loads((exported / f"{section}.json").read_text())
    vae = json.loads((exported / "vae_config.json").read_text())
    assert {key: vae[key] for key in top["vae_config"]} == top["vae_config"]
    before = json.loads((goldens / "hf" / "config.json").read_text())
    assert {**top, "architectures": ["Bagel"]} == {**before, "vit_select_layer": -2, "vit_rope": False}


def test_transformers_reads_tokenizer_image_processor_and_configs(exported: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, SiglipImageProcessor, SiglipVisionConfig

    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == GenerationConfig.from_pretrained(exported).eos_token_id == 412
    pixels = SiglipImageProcessor.from_pretrained(exported, local_files_only=True)(Image.new("RGB", (30, 50), "white"), return_tensors="pt")
    assert pixels["pixel_values"].shape == (1, 3, 224, 224) and torch.all(pixels["pixel_values"] == 1)
    llm = Qwen2Config.from_json_file(exported / "llm_config.json")
    assert (llm.hidden_size, llm.num_key_value_heads, llm.vocab_size) == (128, 2, 544)
    assert SiglipVisionConfig.from_json_file(exported / "vit_config.json").image_size == 224


def test_pictures_get_the_side_of_the_position_grid(goldens: Path) -> None:
    arch = HFFolder(goldens / "hf").arch
    assert arch.vit is not None
    rotary = replace(arch, vit_rope=True, vit_max_num_patch_per_side=10)
    assert preprocessor_config(arch)["size"] == {"height": 224, "width": 224}
    assert preprocessor_config(rotary)["size"] == {"height": 140, "width": 140}
    with pytest.raises(ValueError, match="no image processor"):
        preprocessor_config(replace(arch, vit=None))


def test_parts_that_are_switched_off_have_no_files(goldens: Path, tmp_path: Path) -> None:
    arch = replace(HFFolder(goldens / "hf").arch, vit=None, autoencoder=None)
    out = write_folder(tmp_path / "out", arch, {}, lambda width, side: torch.zeros(side * side, width))
    assert {path.name for path in out.iterdir()} == {"config.json", "llm_config.json", "README.md"}


@pytest.mark.parametrize(
    ("ends", "expected"),
    [(None, 412), (410, [412, 410]), ([410, 409], [412, 410, 409]), (412, 412), ([410, 412], [410, 412])],
)
def test_a_pretrained_end_of_text_does_not_hide_the_end_of_an_answer(
    goldens: Path, tmp_path: Path, ends: int | list[int] | None, expected: int | list[int]
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((goldens / "hf" / "tokenizer.json").read_bytes())
    stated = {"top_p": 0.8, **({} if ends is None else {"eos_token_id": ends})}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    write_generation_config(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"top_p": 0.8, "eos_token_id": expected}


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_special_tokens_come_from_any_file_of_the_tokenizer(goldens: Path, tmp_path: Path, name: str) -> None:
    assert token_ids(tmp_path) == {}
    (tmp_path / name).write_bytes((goldens / "hf" / name).read_bytes())
    assert [token_ids(tmp_path)[token] for token in ("<|im_start|>", "<|im_end|>")] == [411, 412]


def test_a_config_class_of_a_server_reads_config_json(exported: Path) -> None:
    """AutoConfig knows no BAGEL: servers bring a class of this model type, which reads the file as any model's."""
    from transformers import PretrainedConfig

    class ServedConfig(PretrainedConfig):
        model_type = "bagel"

    config = ServedConfig.from_pretrained(exported, local_files_only=True)
    assert config.architectures == ["BagelForConditionalGeneration"] and config.max_latent_size == 16
    assert config.llm_config["vocab_size"] == 544 and config.vit_config["image_size"] == 224 and config.vae_config["downsample"] == 8
