# SPDX-License-Identifier: Apache-2.0
"""The shape of a whole model: decoder, vision tower, autoencoder, and what connects them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import read_json_as
from megatron_bagel.config.architecture.autoencoder import AutoencoderArch
from megatron_bagel.config.architecture.config_sources import ConfigSources
from megatron_bagel.config.architecture.llm import LLMArch
from megatron_bagel.config.architecture.measured_parts import decoder_of, vision_tower_of
from megatron_bagel.config.architecture.settings import field_names, field_values
from megatron_bagel.config.architecture.stored_sizes import corrected, top_sizes, vision_grid
from megatron_bagel.config.architecture.top_config import read_top_config
from megatron_bagel.config.architecture.vit import ViTArch
from megatron_bagel.config.architecture.weight_files import folder_shapes
from megatron_bagel.config.whole_numbers import require_sizes

_PARTS = {"llm", "vit", "autoencoder"}


@dataclass
class BagelArch:
    """The shape of a whole model. ``vit`` is None without image understanding, ``autoencoder`` is None without image generation."""

    llm: LLMArch
    vit: ViTArch | None = None
    autoencoder: AutoencoderArch | None = None
    latent_patch_size: int = 2
    max_latent_size: int = 32
    vit_max_num_patch_per_side: int = 70
    vit_select_layer: int = -2
    connector_act: str = "gelu_pytorch_tanh"
    interpolate_pos: bool = False
    vit_rope: bool = False
    timestep_shift: float = 1.0

    def __post_init__(self) -> None:
        require_sizes(self, ("latent_patch_size", "max_latent_size", "vit_max_num_patch_per_side"), "model")
        if self.connector_act != "gelu_pytorch_tanh":
            raise ValueError(f"connector_act {self.connector_act!r} is not supported; the released connector uses gelu_pytorch_tanh")
        if self.vit is not None:
            self._check_vit(self.vit)
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift is {self.timestep_shift}; it must be positive (1 leaves timesteps as drawn)")

    def _check_vit(self, vit: ViTArch) -> None:
        if not 1 <= self.n_vit_layers <= vit.num_hidden_layers:
            raise ValueError(
                f"vit_select_layer {self.vit_select_layer} of a ViT of {vit.num_hidden_layers} layers leaves {self.n_vit_layers} layers"
            )
        side = vit.image_size // vit.patch_size
        if not (self.vit_rope or vit.rope) and side != self.vit_max_num_patch_per_side:
            raise ValueError(
                f"vit_max_num_patch_per_side is {self.vit_max_num_patch_per_side}, but the ViT's learned positions form a grid of "
                f"side {side} (image_size {vit.image_size} / patch_size {vit.patch_size}); set --vit_max_num_patch_per_side {side}"
            )

    @property
    def n_vit_layers(self) -> int:
        """Number of vision layers that are built: a select layer of -1 keeps all, -2 drops the last one."""
        if self.vit is None:
            return 0
        layers = self.vit.num_hidden_layers
        return layers + 1 + self.vit_select_layer if self.vit_select_layer < 0 else self.vit_select_layer

    @property
    def latent_token_dim(self) -> int:
        """Number of channels of one latent token: a patch of ``latent_patch_size``² cells of ``z_channels``."""
        return self.latent_patch_size**2 * (self.autoencoder.z_channels if self.autoencoder else 0)

    @property
    def vae_token_pixels(self) -> int:
        """Pixels covered by one latent token along one side."""
        return self.latent_patch_size * (self.autoencoder.downsample if self.autoencoder else 8)

    @classmethod
    def from_hf_folder(
        cls,
        folder: str | Path,
        llm: dict[str, Any] | None = None,
        defaults: dict[str, Any] | None = None,
        sources: ConfigSources | None = None,
        **overrides: Any,
    ) -> BagelArch:
        """Read a folder in the released format: ``llm_config.json``, ``vit_config.json``, tensor shapes and, if usable, ``config.json``.

        Where a file and the shape of a tensor disagree, the shape counts and a notice tells it. A folder that does not say which layer
        it has, in a file or by its tensors, is taken for the released one: MoT layers with QK-norm.

        Args:
            folder: Model folder.
            llm: Settings of the decoder that win over ``llm_config.json``.
            defaults: Settings of this class where neither ``config.json`` nor a tensor says them.
            sources: Where a folder without these files has its configs, and which weight file to look into.
            **overrides: Settings of this class that win over the folder, as the original takes them from flags alone.

        Raises:
            ValueError: with the file that is missing or wrong.
        """
        folder, sources = Path(folder), sources or ConfigSources()
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist")
        shapes = folder_shapes(sources.weights_folder or folder, sources.weights_name)
        top = read_top_config(folder, {field.name: field.default for field in fields(cls) if field.name not in _PARTS})
        given = {name: value for name, value in overrides.items() if value is not None}
        vit_file = sources.vit_config(folder) if top.get("visual_und", True) else None
        vit = read_json_as(partial(vision_tower_of, shapes), vit_file, "model folder") if vit_file is not None else None
        ae_file = folder / "ae.safetensors"
        has_ae = top.get("visual_gen", True) and (ae_file.is_file() or "vae2llm.weight" in shapes)
        autoencoder = sources.autoencoder or AutoencoderArch.beside(ae_file) if has_ae else None
        sizes = top_sizes(shapes, autoencoder.z_channels) if autoencoder is not None else {}
        if vit is not None:
            sizes |= vision_grid(shapes, vit.num_hidden_layers)
        stated = {name: value for name, value in top.items() if name in field_names(cls)}
        settings = corrected(stated, {name: size for name, size in sizes.items() if name not in given}, folder / "config.json")
        if vit is not None and not (vit.rope or {**settings, **given}.get("vit_rope")):
            settings.setdefault("vit_max_num_patch_per_side", vit.image_size // vit.patch_size)
        defaults = {name: value for name, value in (defaults or {}).items() if value is not None}
        llm_file = sources.llm_config(folder)
        make_llm = partial(decoder_of, shapes, llm or {}, llm_file)
        return cls(
            llm=read_json_as(make_llm, llm_file, "model folder"), vit=vit, autoencoder=autoencoder, **{**defaults, **settings, **given}
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the top-level ``config.json`` of the released format."""
        ae = self.autoencoder
        return {
            "model_type": "bagel",
            "architectures": ["Bagel"],
            "visual_gen": ae is not None,
            "visual_und": self.vit is not None,
            "llm_config": self.llm.to_hf(),
            "vit_config": self.vit.to_hf() if self.vit else None,
            "vae_config": {"z_channels": ae.z_channels, "downsample": ae.downsample} if ae else None,
            **{name: value for name, value in field_values(self).items() if name not in _PARTS},
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for a training checkpoint. ``from_dict`` reads it back."""
        return {**self.to_hf(), "autoencoder": self.autoencoder.to_dict() if self.autoencoder else None}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> BagelArch:
        """Read what ``to_dict`` returned."""
        vit, ae = config.get("vit_config"), config.get("autoencoder")
        return cls(
            llm=LLMArch.from_hf(config["llm_config"]),
            vit=ViTArch.from_hf(vit) if vit else None,
            autoencoder=AutoencoderArch.from_dict(ae) if ae else None,
            **{name: config[name] for name in field_names(cls) - _PARTS if name in config},
        )
