# SPDX-License-Identifier: Apache-2.0
"""Model folders as they lie on disks: every form found in the wild loads to the same weights, and damaged ones are refused by name."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bagel.checkpoint.convert import import_folder
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.initial_weights import initial_value
from megatron_bagel.checkpoint.hf.load import load_weights, named_weights
from megatron_bagel.checkpoint.hf.pretrained import grown_source
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, ShardedWriter
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import ConfigSources
from tests.checkpoint.parameter_tree import model_like

Weights = dict[str, torch.Tensor]
HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


@pytest.fixture
def folder(goldens: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(goldens / "hf", tmp_path / "hf"))


def load(folder: HFFolder) -> Weights:
    """Return all parameters of the folder's default weights."""
    weight_map = WeightMap(folder.arch)
    modules = model_like(weight_map)
    load_weights(folder.weights(folder.default_weights()[0]), weight_map, modules)
    return {name: parameter.detach() for name, parameter in named_weights(modules).items()}


def equal(first: Weights, second: Weights) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def edit(folder: Path, change: Callable[[Weights], object]) -> None:
    tensors = load_file(folder / "ema.safetensors")
    change(tensors)
    save_file(tensors, folder / "ema.safetensors")


def set_json(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({name: value for name, value in {**content, **changes}.items() if value is not None}))


def rename(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "ema.safetensors").rename(folder / name)


def shard(folder: Path) -> None:
    tensors = load_file(folder / "ema.safetensors")
    (folder / "ema.safetensors").unlink()
    with ShardedWriter(folder / "ema.safetensors", {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}, 600_000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert len(list(folder.glob("ema-*.safetensors"))) > 2


def hub_cache(folder: Path) -> None:
    """Move every file into ``blobs`` and leave a link under its name, as the hub's cache does."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:064x}")
        file.symlink_to(Path("..") / "blobs" / f"{number:064x}")


def other_files(folder: Path) -> None:
    """Add the files that the original's trainer and the hub leave beside weights."""
    for name in ("optimizer.00000-of-00008.pt", "scheduler.pt", "data_status.pt", "README.md", ".gitattributes", "pytorch_model.bin"):
        (folder / name).write_bytes(b"\x80\x02not read")


FORMS: dict[str, Callable[[Path], object]] = {
    "as released": lambda folder: None,
    "invalid config.json": lambda folder: (folder / "config.json").write_text('{"architectures": ["Bagel"],}'),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "several files with an index": shard,
    "model.safetensors without ema.safetensors": rename("model.safetensors"),
    "links into a hub cache": hub_cache,
    "other files": other_files,
    "no position tables": lambda folder: edit(folder, lambda t: [t.pop(n) for n in list(t) if n.endswith("pos_embed")]),
    "optimizer state among the tensors": lambda folder: edit(
        folder, lambda t: t.update({"optimizer.state.0.exp_avg": torch.zeros(3), "optimizer.state.0.step": torch.ones(())})
    ),
    "buffers among the tensors": lambda folder: edit(
        folder,
        lambda t: t.update(
            {
                "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16),
                "vit_model.vision_model.embeddings.position_ids": torch.arange(256)[None],
            }
        ),
    ),
    "fp32": lambda folder: edit(folder, lambda t: t.update({n: v.float() for n, v in t.items()})),
    "layer kind not stated": lambda folder: set_json(folder / "llm_config.json", layer_module=None, qk_norm=None),
    "another vocabulary stated": lambda folder: set_json(folder / "llm_config.json", vocab_size=500),
    "another image size stated": lambda folder: set_json(folder / "vit_config.json", image_size=384),
    "used ViT layers alone stated": lambda folder: set_json(folder / "vit_config.json", num_hidden_layers=2),
    "no autoencoder": lambda folder: (folder / "ae.safetensors").unlink(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_to_the_same_weights(goldens: Path, folder: Path, form: str) -> None:
    FORMS[form](folder)
    assert equal(load(HFFolder(folder)), load(HFFolder(goldens / "hf")))


@pytest.mark.parametrize("name", ["ema_bf16.safetensors", "bagel-merged.safetensors"])
def test_a_weight_file_of_another_name_is_chosen_by_flag(goldens: Path, folder: Path, name: str) -> None:
    rename(name)(folder)
    with pytest.raises(ValueError, match=rf"has no ema\.safetensors .*other files of weights: {name} \(choose one with --weights_name\)"):
        HFFolder(folder).weights()
    chosen = HFFolder(folder, sources=ConfigSources(weights_name=name))
    assert chosen.available_weights() == ["ema" if name.startswith("ema") else "model"]
    assert equal(load(chosen), load(HFFolder(goldens / "hf")))
    with pytest.raises(ValueError, match=r"--weights_name absent\.safetensors: .* has no absent\.safetensors"):
        HFFolder(folder, sources=ConfigSources(weights_name="absent.safetensors"))


def test_fp16_is_read_and_imported_as_it_is(goldens: Path, folder: Path, tmp_path: Path) -> None:
    edit(folder, lambda t: t.update({n: v.half() for n, v in t.items()}))
    weights, whole = load(HFFolder(folder)), load(HFFolder(goldens / "hf"))
    assert all(torch.equal(weights[name], whole[name].half().float()) for name in whole)
    checkpoint = CheckpointWeights(import_folder(folder, tmp_path / "checkpoints"))
    assert torch.equal(checkpoint.model("llm2vae.weight").float(), weights["llm2vae.weight"])


def test_fp8_is_refused_with_the_reason(folder: Path) -> None:
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    edit(folder, lambda t: t.update({name: t[name].to(torch.float8_e4m3fn), f"{name}_scale": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"ema\.safetensors holds fp8 weights \(F8_E4M3\).*scales.*bf16, fp16 or fp32"):
        load(HFFolder(folder))


def test_integer_weights_are_refused(folder: Path) -> None:
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    edit(folder, lambda t: t.update({name: t[name].to(torch.uint8)}))
    with pytest.raises(ValueError, match=rf"{name} holds uint8 .*quantized"):
        load(HFFolder(folder))


def test_the_table_wins_over_config_json_and_the_disagreement_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    set_json(folder / "config.json", max_latent_size=32)
    edit(folder, lambda t: t.update({"latent_pos_embed.pos_embed": torch.zeros(4096, 128)}))
    with caplog.at_level(logging.INFO):
        assert HFFolder(folder).arch.max_latent_size == 64
    assert "config.json says max_latent_size 32, the table has 4,096 rows: 64" in caplog.text
    assert HFFolder(folder, max_latent_size=8).arch.max_latent_size == 8


def test_extra_tokens_of_a_fork_are_counted_in_the_table(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, lambda t: t.update({n: torch.cat([t[n], t[n][:40]]) for n in (HEAD, EMBEDDING)}))
    arch = HFFolder(folder).arch
    assert arch.llm.vocab_size == 584
    assert "llm_config.json says vocab_size 544, the token embedding has 584 rows of 128 values: 584" in caplog.text
    assert load(HFFolder(folder))["output_layer.weight"].shape == (584, 128)


def test_tokens_without_rows_are_refused_or_get_seeded_rows(goldens: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, reader = HFFolder(goldens / "hf"), HFFolder(goldens / "hf").weights()
    arch = replace(source.arch, llm=replace(source.arch.llm, vocab_size=560))
    weight_map = WeightMap(arch)
    with pytest.raises(ValueError, match=r"has shape \(544, 128\), this model needs \(560, 128\).*--grow_vocabulary True"):
        load_weights(reader, weight_map, model_like(weight_map))
    modules = model_like(weight_map)
    with caplog.at_level(logging.INFO):
        load_weights(grown_source(reader, weight_map, partial(initial_value, arch=arch, seed=1)), weight_map, modules)
    assert "embed_tokens.weight grows from 544 to 560 rows; the new ones start from seeded values" in caplog.text
    grown, weights = named_weights(modules), load(source)
    for name, tensor in weights.items():
        assert torch.equal(grown[name][: len(tensor)], tensor), name
        if weight_map.entries[name].vocabulary:
            seeded = initial_value(weight_map.entries[name], arch, seed=1)[544:]
            assert torch.equal(grown[name][544:], seeded.bfloat16().float())


def test_a_layer_that_a_config_promises_must_be_there(folder: Path) -> None:
    edit(folder, lambda t: [t.pop(name) for name in list(t) if ".layers.3." in name])
    with pytest.raises(ValueError, match=r"lacks \d+ tensors this model needs: language_model\.model\.layers\.3"):
        load(HFFolder(folder))


def test_a_tied_head_may_be_absent_or_stored_twice(folder: Path) -> None:
    set_json(folder / "llm_config.json", tie_word_embeddings=True)
    edit(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    twice = load(HFFolder(folder))
    assert "output_layer.weight" not in twice
    edit(folder, lambda t: t.pop(HEAD))
    assert equal(load(HFFolder(folder)), twice)
    set_json(folder / "llm_config.json", tie_word_embeddings=None)
    assert equal(load(HFFolder(folder)), twice)
    edit(folder, lambda t: t.update({HEAD: t[EMBEDDING] + 1}))
    assert "output_layer.weight" in load(HFFolder(folder))
    set_json(folder / "llm_config.json", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from .*embed_tokens.*tie_word_embeddings"):
        load(HFFolder(folder))


def test_a_checkpoint_of_the_original_trainer_has_its_configs_elsewhere(goldens: Path, folder: Path, tmp_path: Path) -> None:
    trained = tmp_path / "0002000"
    trained.mkdir()
    shutil.copy(folder / "ema.safetensors", trained / "ema.safetensors")
    shutil.copy(folder / "ema.safetensors", trained / "model.safetensors")
    other_files(trained)
    llm, vit = tmp_path / "qwen", tmp_path / "siglip"
    llm.mkdir()
    vit.mkdir()
    shutil.copy(folder / "llm_config.json", llm / "config.json")
    set_json(llm / "config.json", layer_module=None, qk_norm=None, tie_word_embeddings=True, vocab_size=600)
    (vit / "config.json").write_text(json.dumps({"vision_config": json.loads((folder / "vit_config.json").read_text())}))
    with pytest.raises(ValueError, match=r"no file .*llm_config\.json; a checkpoint of the original trainer has none.*--llm_path"):
        _ = HFFolder(trained).arch
    opened = HFFolder(trained, sources=ConfigSources(llm, vit))
    assert opened.available_weights() == ["ema", "model"]
    assert equal(load(opened), load(HFFolder(goldens / "hf")))
    with pytest.raises(ValueError, match=r"--vit_path: there is no file"):
        _ = HFFolder(trained, sources=ConfigSources(llm, tmp_path)).arch


def test_the_root_of_a_hub_cache_names_the_snapshot(goldens: Path, tmp_path: Path) -> None:
    shutil.copytree(goldens / "hf", tmp_path / "models--BAGEL/snapshots/1a2b")
    with pytest.raises(ValueError, match=r"root of a hub cache: give .*snapshots/1a2b"):
        HFFolder(tmp_path / "models--BAGEL")


@pytest.mark.parametrize("kept", [4, 1000, -1])
def test_half_a_download_is_refused(folder: Path, kept: int) -> None:
    file = folder / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"ema\.safetensors is not a complete safetensors file.*download or copy it again"):
        load(HFFolder(folder))


def test_a_download_that_did_not_end_is_told(folder: Path) -> None:
    cache = folder / ".cache/huggingface/download"
    cache.mkdir(parents=True)
    (folder / "ema.safetensors").rename(cache / "x.1a2b.incomplete")
    with pytest.raises(ValueError, match=r"a download did not end: x\.1a2b\.incomplete"):
        HFFolder(folder).weights()
    shutil.move(cache / "x.1a2b.incomplete", folder / "ema.safetensors.incomplete")
    with pytest.raises(ValueError, match=r"index\.json\); a download did not end: ema\.safetensors\.incomplete"):
        HFFolder(folder).weights()  # and it is not offered for --weights_name
    (folder / "ema.safetensors").symlink_to("../blobs/absent")
    with pytest.raises(ValueError, match=r"ema\.safetensors is a link to \.\./blobs/absent, which does not exist"):
        HFFolder(folder).weights()


def test_a_header_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [0, 1 << 22]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 64)
    with pytest.raises(ValueError, match=r"names tensors up to byte 4,194,3\d\d, and it has \d+"):
        SafetensorsReader(file)
    file.write_bytes(struct.pack("<Q", 1 << 40) + header)
    with pytest.raises(ValueError, match="its header claims 1,099,511,627,776"):
        SafetensorsReader(file)
    file.write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(ValueError, match="its header lists no tensors"):
        SafetensorsReader(file)


def test_an_index_without_its_files_is_refused(folder: Path) -> None:
    shard(folder)
    next(folder.glob("ema-00002*")).unlink()
    with pytest.raises(ValueError, match=r"names files that do not exist: .*ema-00002-of-\d+\.safetensors \(1 of \d\)"):
        load(HFFolder(folder))
    set_json(folder / "ema.safetensors.index.json", weight_map={"a": "../other/x.safetensors"})
    with pytest.raises(ValueError, match=r"names files outside its folder: \.\./other/x\.safetensors"):
        load(HFFolder(folder))


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_the_name_of_safetensors_is_not_opened(folder: Path, tmp_path: Path, zipped: bool) -> None:
    torch.save({"a": Trap(tmp_path / "executed")}, folder / "ema.safetensors", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"ema\.safetensors is a PyTorch pickle.*so it was not opened"):
        load(HFFolder(folder))
    assert not (tmp_path / "executed").exists()


def test_a_web_page_with_the_name_of_weights_is_told(folder: Path) -> None:
    (folder / "ema.safetensors").write_text("<!doctype html><title>Sign in</title>")
    with pytest.raises(ValueError, match="is a web page and no weights"):
        load(HFFolder(folder))
