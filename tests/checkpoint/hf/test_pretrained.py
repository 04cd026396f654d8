# SPDX-License-Identifier: Apache-2.0
"""First weights: seeded by name, taken from Qwen2- and SigLIP-style folders, vocabularies that grow and never shrink."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights, initialise
from megatron_bagel.checkpoint.hf.load import named_weights
from megatron_bagel.checkpoint.hf.pretrained import grown_vocabulary, patch_convolution_to_linear
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from tests.checkpoint.hf.test_weight_map import tiny_arch
from tests.checkpoint.parameter_tree import model_like


def _qwen_folder(path: Path, arch: BagelArch, tied: bool = False) -> dict[str, torch.Tensor]:
    """A plain Qwen2 folder (no QK-norm, no experts) of random weights."""
    plain = replace(arch.llm, layer_module="Qwen2DecoderLayer", qk_norm=False, tie_word_embeddings=tied)
    weight_map = WeightMap(BagelArch(plain))
    names = {name: shape for name, shape in weight_map.hf_shapes().items() if name not in weight_map.copies}  # as Qwen's are stored
    tensors = {name.removeprefix("language_model."): torch.randn(shape) for name, shape in names.items()}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return tensors


def _siglip_folder(path: Path, arch: BagelArch) -> dict[str, torch.Tensor]:
    """A SigLIP folder: convolution, all layers, pooling head."""
    deeper = replace(arch, vit_select_layer=-1)
    names = {n: s for n, s in WeightMap(deeper).hf_shapes().items() if n.startswith("vit_model.")}
    tensors = {name.removeprefix("vit_model."): torch.randn(shape) for name, shape in names.items()}
    conv = "vision_model.embeddings.patch_embedding.weight"
    tensors[conv] = torch.randn(arch.vit.hidden_size, 3, 14, 14)
    tensors |= {"vision_model.head.probe": torch.zeros(1, 1, 4), "logit_scale": torch.zeros(1)}
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    return tensors


def _loaded(arch: BagelArch, llm: Path | None, vit: Path | None, copy_init_moe: bool = False) -> dict[str, torch.Tensor]:
    modules = model_like(WeightMap(arch))
    InitialWeights.of(arch, 7, llm, vit, copy_init_moe=copy_init_moe).fill(modules)
    return {name: p.detach() for name, p in named_weights(modules).items()}


def test_start_values_depend_on_seed_and_name_only() -> None:
    weight_map = WeightMap(tiny_arch())
    runs = [model_like(weight_map) for _ in range(3)]
    initialise(runs[0], weight_map, 1)
    initialise(reversed(runs[1]), weight_map, 1)
    initialise(runs[2], weight_map, 2)
    first, again, other = (named_weights(modules) for modules in runs)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["connector.fc1.weight"], other["connector.fc1.weight"])
    assert not first["llm2vae.weight"].any() and (first["final_layernorm.gen.weight"] == 1).all()
    assert not torch.equal(first["decoder.layers.0.mlp.und.linear_fc2.weight"], first["decoder.layers.1.mlp.und.linear_fc2.weight"])


def test_pretrained_folders_fill_their_parts(tmp_path: Path) -> None:
    arch = tiny_arch()
    llm, vit = _qwen_folder(tmp_path / "llm", arch), _siglip_folder(tmp_path / "vit", arch)
    named = _loaded(arch, tmp_path / "llm", tmp_path / "vit")
    assert torch.equal(named["output_layer.weight"], llm["lm_head.weight"])
    assert torch.equal(named["decoder.layers.1.mlp.und.linear_fc2.weight"], llm["model.layers.1.mlp.down_proj.weight"])
    assert (named["decoder.layers.0.self_attention.und.q_layernorm.weight"] == 1).all()
    prefix = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(named[f"vit_model.{prefix}"], vit[prefix])
    assert all(not t.isnan().any() for t in named.values())


def test_the_generation_expert_may_start_as_a_copy(tmp_path: Path) -> None:
    arch = tiny_arch()
    _qwen_folder(tmp_path / "llm", arch)
    for llm in (tmp_path / "llm", None):
        named = _loaded(arch, llm, None, copy_init_moe=True)
        apart = _loaded(arch, llm, None)
        twins = [name for name in named if ".gen." in name]
        assert twins and all(torch.equal(named[name], named[name.replace(".gen.", ".und.")]) for name in twins)
        assert any(not torch.equal(apart[name], named[name]) for name in twins)
        assert all(torch.equal(apart[name], named[name]) for name in named if name not in twins)


def test_patch_convolution_becomes_the_same_linear_map() -> None:
    weight, pixels = torch.randn(5, 3, 2, 2), torch.randn(1, 3, 2, 2)
    convolved = torch.nn.functional.conv2d(pixels, weight).reshape(5)
    token = pixels[0].permute(1, 2, 0).reshape(-1)  # (row, column, channel)
    torch.testing.assert_close(patch_convolution_to_linear(weight) @ token, convolved)


def test_head_of_a_tied_folder_starts_as_the_embedding(tmp_path: Path) -> None:
    arch = tiny_arch()
    llm = _qwen_folder(tmp_path / "llm", arch, tied=True)
    named = _loaded(arch, tmp_path / "llm", None)
    assert torch.equal(named["output_layer.weight"], llm["model.embed_tokens.weight"])


def test_untied_folder_serves_a_tied_model(tmp_path: Path) -> None:
    arch = tiny_arch()
    _qwen_folder(tmp_path / "llm", arch)
    tied = replace(arch, llm=replace(arch.llm, tie_word_embeddings=True))
    assert "output_layer.weight" not in _loaded(tied, tmp_path / "llm", None)


def test_vocabulary_grows_and_is_never_cut(tmp_path: Path) -> None:
    arch = tiny_arch()
    llm = _qwen_folder(tmp_path / "llm", arch)
    assert grown_vocabulary(arch, 30) is arch
    grown = grown_vocabulary(arch, 43)
    named = _loaded(grown, tmp_path / "llm", None)
    assert named["embedding.word_embeddings.weight"].shape[0] == 43
    assert torch.equal(named["embedding.word_embeddings.weight"][:40], llm["model.embed_tokens.weight"])
    assert named["embedding.word_embeddings.weight"][40:].abs().sum() > 0
    smaller = replace(arch, llm=replace(arch.llm, vocab_size=30))
    with pytest.raises(ValueError, match="never truncated"):
        _loaded(smaller, tmp_path / "llm", None)


def test_missing_weights_never_become_random_ones(tmp_path: Path) -> None:
    arch = tiny_arch()
    with pytest.raises(ValueError, match="--llm_path: there is no folder"):
        _loaded(arch, tmp_path / "nowhere", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--vit_path: .* holds neither model.safetensors"):
        _loaded(arch, None, tmp_path / "empty")
    _qwen_folder(tmp_path / "llm", arch)
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors.pop("model.layers.1.self_attn.v_proj.bias")
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    with pytest.raises(ValueError, match=r"v_proj\.bias"):
        _loaded(arch, tmp_path / "llm", None)


def test_foreign_tensor_in_a_vision_folder_is_named(tmp_path: Path) -> None:
    arch = tiny_arch()
    tensors = _siglip_folder(tmp_path / "vit", arch)
    save_file({**tensors, "vision_model.surprise": torch.zeros(1)}, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ValueError, match="surprise"):
        _loaded(arch, None, tmp_path / "vit")
