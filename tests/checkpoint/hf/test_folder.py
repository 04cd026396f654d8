# SPDX-License-Identifier: Apache-2.0
"""A released-layout folder goes in and comes out bit for bit, and whatever does not fit is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bagel.checkpoint.hf.folder import HFFolder, WeightFile, copy_tokenizer, write_folder
from megatron_bagel.checkpoint.hf.load import load_weights, named_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch
from tests.checkpoint.hf.exported import export
from tests.checkpoint.parameter_tree import model_like


def zero_table(width: int, side: int) -> torch.Tensor:
    return torch.zeros(side * side, width)


@pytest.fixture
def folder(goldens: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "hf"
    shutil.copytree(goldens / "hf", copy)
    return copy


def _edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def _load(folder: Path, **kw: tuple[str, ...]) -> list[torch.nn.Module]:
    source = HFFolder(folder)
    weight_map = WeightMap(source.arch)
    modules = model_like(weight_map)
    load_weights(source.weights("ema"), weight_map, modules, **kw)
    return modules


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_round_trip_is_bit_for_bit(folder: Path, tmp_path: Path, dtype: str) -> None:
    source = HFFolder(folder)
    named = named_weights(_load(folder))
    recorded = load_file(folder / "ema.safetensors")
    tables = {t.shape: recorded[name] for name, t in WeightMap(source.arch).tables.items()}
    out = write_folder(
        tmp_path / "out",
        source.arch,
        {"ema": WeightFile(lambda name: named[name].data, dtype)},
        lambda width, side: tables[(side * side, width)],
        tokenizer=folder,
        autoencoder=folder / "ae.safetensors",
    )
    written = load_file(out / "ema.safetensors")
    assert set(written) == set(recorded)
    for name, tensor in recorded.items():
        assert torch.equal(written[name].float(), tensor.float())
        if dtype == "bf16":
            assert written[name].dtype == tensor.dtype
    assert (out / "ae.safetensors").read_bytes() == (folder / "ae.safetensors").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    again = HFFolder(out)
    assert again.available_weights() == ["ema"]
    assert (again.arch.llm.hidden_size, again.arch.vit, again.arch.max_latent_size) == (
        source.arch.llm.hidden_size,
        source.arch.vit,
        source.arch.max_latent_size,
    )


def test_autoencoder_description_travels_with_the_folder(folder: Path, tmp_path: Path) -> None:
    tiny = AutoencoderArch.from_dict(json.loads((folder / "tiny_extra.json").read_text())["ae"])
    source = HFFolder(folder, autoencoder=tiny)
    write_folder(tmp_path / "out", source.arch, {}, zero_table, autoencoder=folder / "ae.safetensors")
    assert HFFolder(tmp_path / "out").arch.autoencoder == tiny


def test_load_fills_every_parameter_and_recomputes_tables(folder: Path) -> None:
    source = HFFolder(folder, max_latent_size=8)  # another size than the file's table
    weight_map = WeightMap(source.arch)
    modules = model_like(weight_map)
    report = load_weights(source.weights(), weight_map, modules)
    assert all(not p.isnan().any() for m in modules for p in m.parameters())
    assert sorted(report.recomputed) == ["latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"]


def test_missing_tensor_is_listed_unless_allowed(folder: Path) -> None:
    name = "language_model.model.layers.2.self_attn.q_norm_moe_gen.weight"
    _edit(folder / "ema.safetensors", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=rf"lacks 1 tensors.*{name}"):
        _load(folder)
    modules = _load(folder, allow_missing=("*.q_norm_moe_gen.weight",))
    unset = named_weights(modules)["decoder.layers.2.self_attention.gen.q_layernorm.weight"]
    assert unset.isnan().all()


def test_left_over_tensor_is_listed_unless_allowed(folder: Path) -> None:
    _edit(folder / "ema.safetensors", lambda t: t.update({"language_model.model.layers.4.extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"layers\.4\.extra.*Check layer_module"):
        _load(folder)
    _load(folder, allow_unexpected=("*.extra",))


def test_part_of_a_fused_parameter_is_never_guessed(folder: Path) -> None:
    _edit(folder / "ema.safetensors", lambda t: t.pop("language_model.model.layers.0.self_attn.k_proj.weight"))
    with pytest.raises(ValueError, match="not the rest of the fused parameter"):
        _load(folder, allow_missing=("*",))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("language_model.lm_head.weight", "vocab_size"),
        ("vae2llm.weight", "check latent_patch_size"),
        ("vit_model.vision_model.embeddings.position_embedding.weight", "and vit_max_num_patch_per_side"),
    ],
)
def test_wrong_shape_names_tensor_and_setting(folder: Path, name: str, hint: str) -> None:
    _edit(folder / "ema.safetensors", lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(ValueError, match=name) as caught:
        _load(folder)
    assert hint in str(caught.value)


def test_dense_layers_from_a_folder_with_experts_need_permission(folder: Path) -> None:
    source = HFFolder(folder, llm={"layer_module": "Qwen2DecoderLayer"})
    weight_map = WeightMap(source.arch)
    with pytest.raises(ValueError, match="layer_module"):
        load_weights(source.weights(), weight_map, model_like(weight_map))
    load_weights(source.weights(), weight_map, model_like(weight_map), allow_unexpected=("*_moe_gen.*",))


def test_parts_switched_off_are_left_over_by_choice(folder: Path) -> None:
    top = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**top, "visual_und": False}))
    source = HFFolder(folder)
    weight_map = WeightMap(source.arch)
    report = load_weights(source.weights(), weight_map, model_like(weight_map)[:1])
    assert "connector.fc1.weight" in report.unexpected


HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def test_a_tied_model_is_written_with_its_head_and_loads_with_or_without_it(folder: Path, tmp_path: Path) -> None:
    arch = HFFolder(folder).arch
    out = export(folder.parent, tmp_path / "out", arch=replace(arch, llm=replace(arch.llm, tie_word_embeddings=True)))
    written = load_file(out / "ema.safetensors")
    assert torch.equal(written[HEAD], written[EMBEDDING]) and written[HEAD].dtype == torch.bfloat16
    assert written.keys() == load_file(folder / "ema.safetensors").keys(), "an untied original has the same names"
    assert "output_layer.weight" not in named_weights(_load(out))
    _edit(out / "ema.safetensors", lambda t: t.pop(HEAD))  # as exports were before
    _load(out)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(folder: Path, tmp_path: Path) -> None:
    arch = HFFolder(folder).arch
    out = export(folder.parent, tmp_path / "out", arch=replace(arch, llm=replace(arch.llm, tie_word_embeddings=True)))
    _edit(out / "ema.safetensors", lambda t: t[HEAD].add_(1))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .*embed_tokens\.weight.*tie_word_embeddings False"):
        _load(out)


def test_paths_that_do_not_exist_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere does not exist"):
        HFFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no model\.safetensors.*weights there: ema"):
        HFFolder(folder).weights("model")
    with pytest.raises(ValueError, match="no tokenizer files"):
        copy_tokenizer(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="there is no tokenizer at .*absent; say where it is with --tokenizer"):
        copy_tokenizer(tmp_path / "absent", tmp_path / "x")


def test_existing_output_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not an empty folder"):
        write_folder(folder, HFFolder(folder).arch, {}, zero_table)
    with pytest.raises(KeyError):  # a getter that fails leaves nothing behind
        write_folder(tmp_path / "out", HFFolder(folder).arch, {"ema": WeightFile({}.__getitem__)}, zero_table)
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
