# SPDX-License-Identifier: Apache-2.0
"""The recorded model and batches as the product's own objects: the folder read by its loader, batches as loaded packs.

Nothing is computed here that training would compute: a batch's pixels, patches and integers go in, and what the original drew
(posterior noise, flow noise) replaces the keyed draws of the image encoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_bagel import platform
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import entries_of, load_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.data.planner.planner import PackPlan
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.image_encoding import ImageEncoder, ImageEncoderSettings
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.layout.items import Mode
from megatron_bagel.layout.pack import Pack, PackImage
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.kernels.choice import KernelsName
from tools.golden_common import present


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass
class GoldenBatch:
    """A recorded batch; ``sample_lens`` count the padding document of the original too."""

    name: str
    loaded: LoadedPack
    expected: dict[str, Tensor]
    sample_lens: list[int]

    @property
    def pack(self) -> Pack:
        """Its layout."""
        return self.loaded.pack


@dataclass
class Parts:
    """A decoder and a vision tower that carry the recorded weights."""

    arch: BagelArch
    decoder: BagelModel
    tower: VisionTower | None

    @cached_property
    def weight_map(self) -> WeightMap:
        """Our parameter names against the recorded ones."""
        return WeightMap(self.arch)

    @property
    def vision(self) -> VisionTower:
        """The vision tower. Raises ValueError where these parts have none."""
        return present(self.tower, "vision tower")

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Those that exist."""
        return [self.decoder] if self.tower is None else [self.decoder, self.tower]

    def by_recorded_name(self, value: Callable[[torch.nn.Parameter], Tensor | None]) -> dict[str, Tensor | None]:
        """``value`` of every parameter under the recorded names, on the host, fused ones cut apart; None stays None."""
        found: dict[str, Tensor | None] = {}
        for entry, parameter in entries_of(self.modules, self.weight_map):
            whole = value(parameter)
            found.update(zip(entry.hf, [None] * len(entry.hf) if whole is None else entry.unfuse(whole.cpu()), strict=True))
        return found


class GoldenModel:
    """The folder ``hf`` of the goldens, and modules made from it in every variant that the cases ask for."""

    def __init__(self, goldens: Path, fused_kernels: KernelsName = "eager") -> None:
        extra_file = goldens / "hf" / "tiny_extra.json"
        extra = read_json(extra_file) if extra_file.is_file() else {}
        autoencoder = AutoencoderArch.from_dict(extra["ae"]) if "ae" in extra else None
        self.goldens, self.fused_kernels = goldens, fused_kernels
        settings = {f.name: extra.get("top", {}).get(f.name) for f in fields(BagelArch) if f.name not in ("llm", "vit", "autoencoder")}
        self.folder = HFFolder(goldens / "hf", autoencoder=autoencoder, **settings)
        self.arch = self.folder.arch

    @cached_property
    def autoencoder(self) -> AutoEncoder:
        """The recorded autoencoder."""
        return load_autoencoder(self.folder.path / "ae.safetensors", self.arch.autoencoder).to(platform.device())

    def parts(self, kind: str | None = None, freeze_und: bool = False, vision: bool = True, generation: bool = True) -> Parts:
        """Fresh modules. ``kind`` is another layer module, which takes the subset of the weights that it has a place for."""
        arch = self.arch
        unused: Sequence[str] = ()
        if kind is not None:
            arch, unused = replace(arch, llm=replace(arch.llm, layer_module=kind)), ("*_moe_gen*",)
        if not vision:
            arch = replace(arch, vit=None)
        if not generation:
            arch = replace(arch, autoencoder=None)
        device = platform.device()
        config = transformer_config(arch.llm, on_cpu=not platform.has_gpu())
        decoder = build_decoder(arch, config, freeze_und=freeze_und, fused_kernels=self.fused_kernels)
        parts = Parts(arch, decoder.to(device), VisionTower(arch).to(device) if vision else None)
        load_weights(self.folder.weights(), parts.weight_map, parts.modules, allow_unexpected=unused)
        return parts


class RecordedImageEncoder(ImageEncoder):
    """The image encoder with the original's noise and its padded encoding."""

    def __init__(
        self, arch: BagelArch, tower: torch.nn.Module | None, autoencoder: AutoEncoder | None, batches: Sequence[GoldenBatch]
    ) -> None:
        super().__init__(arch, tower, autoencoder, ImageEncoderSettings(seed=0, pad_images=True, device=platform.device()))
        self._recorded = {id(batch.pack): batch.expected for batch in batches}

    def flow_noise(self, pack: Pack) -> Tensor:
        """As recorded, or nothing for a batch without latents."""
        recorded = self._recorded[id(pack)]
        return recorded.get("flow_noise", torch.zeros(0, self.arch.latent_token_dim))

    def posterior_noise(self, pack: Pack, images: Sequence[PackImage] | None = None) -> list[Tensor]:
        """The part of the recorded noise that lies on each image itself."""
        side, everyone = self.arch.latent_patch_size, pack.images_of("vae")
        noise = self._recorded[id(pack)]["vae_posterior_noise"]
        return [
            one[:, : rows * side, : columns * side]
            for image, one, (rows, columns) in zip(everyone, noise, pack.latent_shapes.tolist(), strict=True)
            if images is None or image in images
        ]


def load_batch(goldens: Path, name: str, arch: BagelArch) -> GoldenBatch:
    """``batches/<name>`` with what was recorded of it in ``train/<name>_expected``."""
    plain = read_json(goldens / "batches" / f"{name}.json")
    tensors = load_file(goldens / "batches" / f"{name}.safetensors")
    pack = _pack(plain, tensors, arch)
    vae = pack.images_of("vae")
    pixels = tensors.get("padded_images", torch.zeros(0)).float()
    buffer = [image[:, : one.height, : one.width].reshape(-1) for image, one in zip(pixels, vae, strict=True)]
    counts = pack.latent_shapes.prod(1)
    raw = tensors["packed_timesteps"].numpy()[np.cumsum(counts) - counts] if vae else np.zeros(0, dtype=np.float32)
    loaded = LoadedPack(
        plan=PackPlan(0, (), pack.sequence_length, 0.0),
        pack=pack,
        vit_patches=tensors.get("packed_vit_tokens", torch.zeros(0, 1)).float(),
        vae_buffer=torch.cat(buffer) if buffer else torch.zeros(0),
        raw_timesteps=raw,
    )
    return GoldenBatch(name, loaded, load_file(goldens / "train" / f"{name}_expected.safetensors"), plain["sample_lens"])


def _pack(plain: Mapping[str, Any], tensors: Mapping[str, Tensor], arch: BagelArch) -> Pack:
    """The layout, without the padding document that the original appends."""

    def integers(name: str) -> np.ndarray:
        return tensors[name].numpy() if name in tensors else np.zeros(0, dtype=np.int64)

    length = plain["sequence_length"]
    splits = _covering(plain["split_lens"], length)
    latent_shapes = np.array(plain.get("patchified_vae_latent_shapes", []), dtype=np.int64).reshape(-1, 2)
    vit_shapes = _grids(integers("packed_vit_position_ids"), integers("vit_token_seqlens"), arch.vit_max_num_patch_per_side)
    vae_positions, mse_positions = integers("packed_vae_token_indexes"), integers("mse_loss_indexes")
    noised = np.isin(vae_positions[np.cumsum(latent_shapes.prod(1)) - 1], mse_positions) if len(latent_shapes) else np.zeros(0, dtype=bool)
    return Pack(
        sequence_length=length,
        sample_lens=_covering(plain["sample_lens"], length),
        split_lens=splits,
        split_modes=np.array([Mode[mode.upper()] for mode in plain["attn_modes"][: len(splits)]], dtype=np.int64),
        text_ids=integers("packed_text_ids"),
        text_positions=integers("packed_text_indexes"),
        position_ids=integers("packed_position_ids"),
        vae_positions=vae_positions,
        latent_shapes=latent_shapes,
        latent_position_ids=integers("packed_latent_position_ids"),
        vit_positions=integers("packed_vit_token_indexes"),
        vit_position_ids=integers("packed_vit_position_ids"),
        vit_shapes=vit_shapes,
        ce_positions=integers("ce_loss_indexes"),
        labels=integers("packed_label_ids"),
        ce_weights=tensors["ce_loss_weights"].numpy() if "ce_loss_weights" in tensors else np.zeros(0, dtype=np.float32),
        mse_positions=mse_positions,
        images=(
            *_images("vae", latent_shapes, arch.vae_token_pixels, noised),
            *_images("vit", vit_shapes, present(arch.vit, "ViT").patch_size),
        ),
    )


def _covering(lengths: Sequence[int], total: int) -> np.ndarray:
    """The first lengths, as many as ``total`` tokens take."""
    ends = np.cumsum(lengths)
    kept = int(np.searchsorted(ends, total)) + 1
    if ends[kept - 1] != total:
        raise ValueError(f"recorded lengths {list(lengths)} have no boundary at {total} tokens; is the batch file damaged?")
    return np.array(lengths[:kept], dtype=np.int64)


def _grids(ids: np.ndarray, lengths: np.ndarray, side: int) -> np.ndarray:
    """(rows, columns) of ViT images from the position ids of their patches."""
    images = np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []
    return np.array([(len(np.unique(one // side)), len(np.unique(one % side))) for one in images], dtype=np.int64).reshape(-1, 2)


def _images(kind: str, shapes: np.ndarray, pixels: int, noised: Sequence[bool] | np.ndarray = ()) -> list[PackImage]:
    marks = noised if len(noised) else [False] * len(shapes)
    return [
        PackImage(kind, 0, number, int(rows) * pixels, int(columns) * pixels, bool(mark), 0, int(rows * columns))
        for number, ((rows, columns), mark) in enumerate(zip(shapes, marks, strict=True))
    ]
