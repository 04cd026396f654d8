# SPDX-License-Identifier: Apache-2.0
"""init_from_pretrained on folders that transformers wrote: the checkpoint holds what the folders hold, and exports as a BAGEL folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.cli.convert import init_from_pretrained, megatron_to_hf
from megatron_bagel.config.architecture import AutoencoderArch
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import save_autoencoder
from megatron_bagel.sample_world.tokenizer_training import train_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


def _folders(root: Path, family: str) -> None:
    own = {"head_dim": 16, "attention_bias": False} if family == "Qwen3" else {}
    config = getattr(transformers, f"{family}Config")(**SIZES, num_key_value_heads=2, tie_word_embeddings=family == "Qwen2", **own)
    llm = getattr(transformers, f"{family}ForCausalLM")(config).bfloat16()
    llm.save_pretrained(root / "llm", max_shard_size="40KB")
    train_tokenizer(["some words to begin with, and a few more"], root / "llm", 290)
    vit = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=20, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
    )
    transformers.SiglipVisionModel(vit).save_pretrained(root / "vit")
    save_autoencoder(AutoEncoder(AutoencoderArch(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=4)), root / "vae/ae.safetensors")


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_folders_become_a_checkpoint_and_a_bagel_folder(tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    _folders(tmp_path, family)
    out = tmp_path / "checkpoints"
    paths = ["--llm", f"{tmp_path}/llm", "--vit", f"{tmp_path}/vit", "--vae", f"{tmp_path}/vae/ae.safetensors"]
    assert init_from_pretrained.main([*paths, "--output", str(out), "--max-latent-size", "4"]) == 0, capsys.readouterr().err
    checkpoint = CheckpointWeights(out / "0000000")
    llm = {}
    for file in (tmp_path / "llm").glob("*.safetensors"):
        llm |= load_file(file)
    entries = WeightMap(checkpoint.arch).entries
    for expert in ("und", "gen"):
        fused = checkpoint.model(f"decoder.layers.1.self_attention.{expert}.linear_qkv.weight")
        q, _, v = entries[f"decoder.layers.1.self_attention.{expert}.linear_qkv.weight"].unfuse(fused)
        assert torch.equal(q, llm["model.layers.1.self_attn.q_proj.weight"])
        assert torch.equal(v, llm["model.layers.1.self_attn.v_proj.weight"])
        norm = checkpoint.model(f"decoder.layers.0.self_attention.{expert}.q_layernorm.weight")
        given = llm.get("model.layers.0.self_attn.q_norm.weight", torch.ones(checkpoint.arch.llm.head_dim))
        assert torch.equal(norm.float(), given.float())
    assert ("decoder.layers.0.self_attention.und.linear_qkv.bias" in checkpoint.keys()) is (family == "Qwen2")  # noqa: SIM118
    assert not checkpoint.model("llm2vae.weight").any() and checkpoint.model("vae2llm.weight").any()
    conv = load_file(tmp_path / "vit/model.safetensors")
    patch = next(value for name, value in conv.items() if name.endswith("patch_embedding.weight"))
    linear = checkpoint.model("vit_model.vision_model.embeddings.patch_embedding.weight")
    assert torch.equal(linear, patch.permute(0, 2, 3, 1).reshape(16, -1))
    folder = tmp_path / "bagel"
    assert megatron_to_hf.main(["--checkpoint", str(out), "--output", str(folder), "--shard-size", "60KB"]) == 0, capsys.readouterr().err
    assert (folder / "ema.safetensors.index.json").is_file() and not (folder / "ema.safetensors").exists()
    assert (folder / "ae.safetensors").is_file() and (folder / "vocab.json").is_file()
