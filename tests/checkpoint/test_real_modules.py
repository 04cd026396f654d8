# SPDX-License-Identifier: Apache-2.0
"""The table fits the real modules: folder -> Megatron decoder and vision tower -> folder is bit for bit, for every layer kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_bagel.assembly.meta_init import on_meta
from megatron_bagel.checkpoint.hf.folder import HFFolder, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.load import entries_of, load_weights, named_weights
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.config.transformer_config import transformer_config as transformer_config_of_a_run
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.positions import sincos_2d
from tests.checkpoint.hf.test_weight_map import KINDS, tiny_arch
from tests.checkpoint.tiny_run import transformer_config
from tests.distributed import run_ranks


def _modules(arch: BagelArch) -> list[torch.nn.Module]:
    return [build_decoder(arch, transformer_config(arch, bf16=False)), VisionTower(arch)]


def _through_modules(folder: Path, out: Path) -> None:
    source = HFFolder(folder)
    modules, weight_map = _modules(source.arch), WeightMap(source.arch)
    load_weights(source.weights(), weight_map, modules)
    named = named_weights(modules)
    written = {"ema": WeightFile(lambda name: named[name])}
    write_folder(out, source.arch, written, sincos_2d, tokenizer=folder, autoencoder=folder / "ae.safetensors")


def test_released_layout_through_the_real_model(goldens: Path, tmp_path: Path) -> None:
    run_ranks(_through_modules, 1, goldens / "hf", tmp_path / "out", parallel={})
    recorded, written = (load_file(folder / "ema.safetensors") for folder in (goldens / "hf", tmp_path / "out"))
    assert recorded.keys() == written.keys()
    for name, tensor in recorded.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name


@pytest.mark.usefixtures("single_rank")
def test_the_released_size_has_the_recorded_names_and_shapes(goldens: Path) -> None:
    """The decoder and the tower themselves, built on the meta device: 14.6 billion parameters without memory."""
    recorded = json.loads((goldens / "names_shapes_7b.json").read_text())
    llm, vit = LLMArch.from_hf(recorded["assumed_llm"]), ViTArch.from_hf(recorded["assumed_vit"])
    arch = BagelArch(llm, vit, AutoencoderArch(), max_latent_size=64)
    weight_map = WeightMap(arch)
    with on_meta():
        modules = [build_decoder(arch, transformer_config_of_a_run(llm)), VisionTower(arch)]
    shapes: dict[str, tuple[int, ...]] = {name: table.shape for name, table in weight_map.tables.items()}
    for entry, parameter in entries_of(modules, weight_map):
        assert parameter.is_meta and tuple(parameter.shape) == entry.shape, entry.name
        shapes |= {name: tuple(part.shape) for name, part in zip(entry.hf, entry.unfuse(parameter), strict=True)}
    # The file lists layer 0 of each stack; the others repeat it.
    listed = {name: list(shape) for name, shape in shapes.items() if ".layers." not in name or ".layers.0." in name}
    assert listed == recorded["model"]
    assert len(shapes) == 1223 and sum(torch.Size(shape).numel() for shape in shapes.values()) == recorded["total_params"]


def _random_file_round_trip(arch: BagelArch, path: Path) -> bool:
    weight_map, modules = WeightMap(arch), _modules(arch)
    if {e.name for e, _ in entries_of(modules, weight_map)} != set(weight_map.entries):
        return False
    tensors = {name: torch.randn(shape) for name, shape in weight_map.hf_shapes().items()}
    save_file(tensors | {name: tensors[entry.hf[0]].clone() for name, entry in weight_map.copies.items()}, path)
    load_weights(SafetensorsReader(path), weight_map, modules)
    named = named_weights(modules)
    back = {n: t for e in weight_map.entries.values() for n, t in zip(e.hf, e.unfuse(named[e.name].detach()), strict=True)}
    return all(torch.equal(back[name], tensors[name]) for name in weight_map.by_hf)


def _all_kinds(path: Path) -> dict[str, bool]:
    cases = {}
    for kind in KINDS:
        for tied in (False, True):
            arch = tiny_arch(kind, tied, qk_norm=not tied)
            cases[f"{kind} tied={tied}"] = _random_file_round_trip(arch, path)
    return cases


@pytest.mark.distributed
def test_every_layer_kind_has_the_parameters_of_the_table(tmp_path: Path) -> None:
    [cases] = run_ranks(_all_kinds, 1, tmp_path / "x.safetensors", parallel={})
    assert all(cases.values()), cases
