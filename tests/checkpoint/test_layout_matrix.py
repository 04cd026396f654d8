# SPDX-License-Identifier: Apache-2.0
"""Hugging Face -> any layout -> any other layout -> Hugging Face is the identity, bit for bit, for every kind of layer."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from megatron_bagel.checkpoint.convert import Companions, export_checkpoint, import_folder
from megatron_bagel.checkpoint.dist import checksums
from megatron_bagel.checkpoint.dist.load import load_weights_only
from megatron_bagel.checkpoint.dist.saver import Saver
from megatron_bagel.checkpoint.dist.state import Trained
from megatron_bagel.checkpoint.hf.folder import HFFolder, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.positions import sincos_2d
from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing
from tests.distributed import run_ranks

pytestmark = pytest.mark.distributed


@dataclass(frozen=True)
class Layout:
    """Parallel sizes; `ranks` are their product and data-parallel ranks."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    context: int = 1
    first: int | None = None  # layers of the first stage, where stages are uneven

    @property
    def groups(self) -> dict[str, int | None]:
        return {
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual,
            "context_parallel_size": self.context,
        }


LAYOUTS = {
    "one": Layout(1),
    "tp2-dp2": Layout(4, tensor=2),
    "pp2-vpp2": Layout(2, pipeline=2, virtual=2),
    "tp4-pp2": Layout(8, tensor=4, pipeline=2),
    "pp4": Layout(4, pipeline=4),
    "cp2-dp2": Layout(4, context=2),
    "dp2": Layout(2),
    "tp2": Layout(2, tensor=2),
    "tp4": Layout(4, tensor=4),
    "uneven-pp2": Layout(2, pipeline=2, first=1),
    "tp2-pp2-vpp2": Layout(4, tensor=2, pipeline=2, virtual=2),
    "tp2-pp2-cp2": Layout(8, tensor=2, pipeline=2, context=2),
}
FOUR = ("one", "tp2-dp2", "pp2-vpp2", "tp4-pp2")


def _modules(arch: BagelArch, layout: Layout) -> dict[str, torch.nn.Module]:
    config = transformer_config(arch.llm, MegatronArguments(**layout.groups, num_layers_in_first_pipeline_stage=layout.first))
    initialize_kv_sharing(arch.llm.num_key_value_heads)
    chunks = []
    for stage in range(layout.virtual or 1):
        place = {"ignore_virtual": False, "vp_stage": stage} if layout.virtual else {}
        first, last = parallel_state.is_pipeline_first_stage(**place), parallel_state.is_pipeline_last_stage(**place)
        chunks.append(build_decoder(arch, config, first, last, vp_stage=stage if layout.virtual else None))
    modules = {"decoder": chunks[0]} if len(chunks) == 1 else {f"decoder.{number}": chunk for number, chunk in enumerate(chunks)}
    return {**modules, "vision": VisionTower(arch)} if parallel_state.is_pipeline_first_stage() else modules


def load_and_save(layout: Layout, arch: BagelArch, journeys: list[tuple[Path, Path, str]]) -> None:
    """Load each checkpoint's weights on this layout and save them again."""
    for there, here, kind in journeys:
        modules = _modules(arch, layout)
        with torch.no_grad():
            for module in modules.values():
                for parameter in module.parameters():
                    parameter.fill_(float("nan"))
        load_weights_only(there, modules, arch, kind)
        Saver(here).save(1, Trained(modules, arch), {})


def _travel(source: Path, arch: BagelArch, kind: str, names: list[str], root: Path) -> list[Path]:
    """Export after every ordered pair of layouts; the weight files written."""
    imported = import_folder(source, root / "imported", ("ema", "model"), max_latent_size=arch.max_latent_size)
    for name in names:
        layout = LAYOUTS[name]
        run_ranks(load_and_save, layout.ranks, layout, arch, [(imported, root / name, kind)], parallel=layout.groups, timeout=600)
    for name in names:
        layout, others = LAYOUTS[name], [other for other in names if other != name]
        journeys = [(root / other / "0000001", root / f"{other}+{name}", "model") for other in others]
        run_ranks(load_and_save, layout.ranks, layout, arch, journeys, parallel=layout.groups, timeout=600)
    written = []
    for pair in itertools.permutations(names, 2):
        out = root / "out" / "+".join(pair)
        companions = Companions(source, source / "ae.safetensors")
        export_checkpoint(root / "+".join(pair) / "0000001", out, sincos_2d, ("model",), "keep", companions)
        written.append(out / "model.safetensors")
    return written


def _assert_same(files: list[Path], recorded: dict[str, torch.Tensor]) -> None:
    for file in files:
        written = load_file(file)
        assert written.keys() == recorded.keys()
        for name, tensor in recorded.items():
            assert torch.equal(tensor.float(), written[name].float()), f"{file.parent.name}: {name}"


def _with_another_model(source: Path, folder: Path) -> Path:
    """`source` with other weights in model.safetensors than in ema.safetensors."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "ema.safetensors")
    save_file({name: -tensor if "pos_embed" not in name else tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        pytest.param(["one", "tp2-dp2", "pp2-vpp2"], "ema", id="three"),
        pytest.param(list(LAYOUTS), "ema", id="twelve-ema", marks=pytest.mark.slow),
        pytest.param(list(LAYOUTS), "model", id="twelve-model", marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(1800)
def test_released_folder_through_every_pair_of_layouts(goldens: Path, tmp_path: Path, names: list[str], kind: str) -> None:
    source = _with_another_model(goldens / "hf", tmp_path / "hf")
    arch = HFFolder(source).arch
    files = _travel(source, arch, kind, names, tmp_path)
    assert len(files) == len(names) * (len(names) - 1)
    _assert_same(files, load_file(source / f"{kind}.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["ema", "model"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("layers", ["Qwen2MoTDecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2DecoderLayer"])
def test_every_kind_of_layer_through_every_pair_of_layouts(goldens: Path, tmp_path: Path, layers: str, tied: bool, kind: str) -> None:
    """All twelve for the averages; the model's own weights are stored in the same way and go through four."""
    arch = HFFolder(goldens / "hf").arch
    arch = replace(arch, llm=replace(arch.llm, layer_module=layers, tie_word_embeddings=tied, qk_norm=not tied))
    entries = WeightMap(arch).entries
    random = {
        weights: {name: torch.randn(entry.shape, generator=torch.Generator().manual_seed(seed)) for name, entry in entries.items()}
        for seed, weights in enumerate(("ema", "model"))
    }
    source = write_folder(
        tmp_path / "hf", arch, {weights: WeightFile(values.__getitem__, "fp32") for weights, values in random.items()}, sincos_2d,
        tokenizer=goldens / "hf", autoencoder=goldens / "hf" / "ae.safetensors",
    )  # fmt: skip
    names = list(LAYOUTS) if kind == "ema" else list(FOUR)
    files = _travel(source, HFFolder(source).arch, kind, names, tmp_path)
    assert len(files) == len(names) * (len(names) - 1)
    _assert_same(files, load_file(source / f"{kind}.safetensors"))


def test_the_exported_folder_has_the_recorded_names_shapes_and_types(goldens: Path, tmp_path: Path) -> None:
    checkpoint = import_folder(goldens / "hf", tmp_path / "checkpoints")
    assert checksums.damaged(checkpoint) == [] and (checkpoint / checksums.CHECKSUM_FILE).is_file()
    hf = goldens / "hf"
    out = export_checkpoint(checkpoint, tmp_path / "out", sincos_2d, companions=Companions(hf, hf / "ae.safetensors"))
    recorded = json.loads((goldens / "names_shapes.json").read_text())["model"]
    written = load_file(out / "ema.safetensors")
    original = load_file(hf / "ema.safetensors")
    assert {name: list(tensor.shape) for name, tensor in written.items()} == {name: shape for name, (shape, _, _) in recorded.items()}
    assert {name: tensor.dtype for name, tensor in written.items()} == {name: tensor.dtype for name, tensor in original.items()}
