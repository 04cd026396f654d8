# SPDX-License-Identifier: Apache-2.0
"""What vllm-omni 0.30.0 builds and asks for, written down from its loader: our names meet it, and what cannot be served is said."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.serving import serving_problems
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from tests.checkpoint.hf.exported import export

TOKENS = {"<|im_start|>": 151644, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|vision_end|>": 151653}
RELEASED = BagelArch(
    LLMArch(3584, 18944, 28, 28, 4, 152064), ViTArch(1152, 4304, 27, 16, image_size=980), AutoencoderArch(), max_latent_size=64
)


def server_names(llm_layers: int, vit_layers: int) -> set[str]:
    """Every tensor that the server's strict loading needs, under the stored names that its loader maps."""
    names = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    names |= {f"language_model.model.norm{expert}.weight" for expert in ("", "_moe_gen")}
    for layer in (f"language_model.model.layers.{i}." for i in range(llm_layers)):
        for expert in ("", "_moe_gen"):
            names |= {f"{layer}{norm}{expert}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
            names |= {f"{layer}self_attn.{norm}{expert}.weight" for norm in ("q_norm", "k_norm")}
            names |= {f"{layer}self_attn.{part}_proj{expert}.{kind}" for part in "qkv" for kind in ("weight", "bias")}
            names |= {f"{layer}self_attn.o_proj{expert}.weight"}
            names |= {f"{layer}mlp{expert}.{part}_proj.weight" for part in ("gate", "up", "down")}
    modules = ["time_embedder.mlp.0", "time_embedder.mlp.2", "vae2llm", "llm2vae", "connector.fc1", "connector.fc2"]
    vision = "vit_model.vision_model."
    modules += [f"{vision}embeddings.patch_embedding", f"{vision}post_layernorm"]
    parts = [*(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")), "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    modules += [f"{vision}encoder.layers.{i}.{part}" for i in range(vit_layers) for part in parts]
    names |= {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}
    return names | {f"{vision}embeddings.position_embedding.weight", "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_server_finds_every_tensor_at_released_size(tied: bool) -> None:
    arch = replace(RELEASED, llm=replace(RELEASED.llm, tie_word_embeddings=tied))
    shapes = WeightMap(arch).hf_shapes()
    assert server_names(28, 26) == set(shapes)
    assert shapes["language_model.lm_head.weight"] == (152064, 3584)
    assert serving_problems(arch, ["ema"], TOKENS) == []


def test_the_server_finds_every_tensor_of_an_exported_folder(goldens: Path, tmp_path: Path) -> None:
    out = export(goldens, tmp_path / "out")
    assert server_names(4, 2) == set(load_file(out / "ema.safetensors"))
    autoencoder = load_file(out / "ae.safetensors")
    # The loader puts names that begin so into its autoencoder, and no name of the model may.
    assert autoencoder and all(name.startswith(("encoder.", "decoder.")) for name in autoencoder)
    assert not any(name.startswith(("encoder.", "decoder.")) for name in server_names(4, 2))


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        (replace(RELEASED, llm=replace(RELEASED.llm, layer_module="Qwen2MoEDecoderLayer")), "its layers are Qwen2MoEDecoderLayer"),
        (replace(RELEASED, llm=replace(RELEASED.llm, qk_norm=False)), "lacks QK-norm or biases"),
        (replace(RELEASED, llm=replace(RELEASED.llm, attention_bias=False)), "lacks QK-norm or biases"),
        (replace(RELEASED, llm=replace(RELEASED.llm, kv_channels=64)), "its head size 64"),
        (replace(RELEASED, autoencoder=None), "no autoencoder"),
        (replace(RELEASED, autoencoder=AutoencoderArch(ch=32)), "not of FLUX's shape"),
        (replace(RELEASED, vit=None), "no vision tower"),
        (replace(RELEASED, vit_rope=True), "rotary positions"),
        (replace(RELEASED, vit_select_layer=-1), "its number of vision layers is 27, and servers build 26"),
        (replace(RELEASED, vit=ViTArch(1152, 4304, 12, 16, image_size=980)), "its number of vision layers is 11, and servers build 12"),
    ],
)  # fmt: skip
def test_another_model_is_named(arch: BagelArch, reason: str) -> None:
    [problem] = serving_problems(arch, ["ema"], TOKENS)
    assert reason in problem


def test_a_log_line_says_that_servers_need_one_kind(goldens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        out = export(goldens, tmp_path / "out", ("ema", "model"))
    [line] = [message for message in caplog.messages if message.startswith("vllm-omni")]
    assert "it holds ema and model weights" in line and "they need one kind (--weights ema)" in line
    assert "it holds ema and model weights" in (out / "README.md").read_text()
    problems = serving_problems(HFFolder(out).arch, ["ema"], {"<|im_start|>": 1})
    assert problems[-1].endswith("lack <|im_end|>, <|vision_start|>, <|vision_end|>")
    [problem] = serving_problems(RELEASED, ["ema"], {**TOKENS, "added": 152064})
    assert problem == "its tokenizer has 152065 ids and its table 152064 rows, and servers build the larger table"
