"""The shape of a whole model: decoder, vision tower, autoencoder, and what connects them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import read_json_as
from megatron_bagel.config.architecture.autoencoder import AutoencoderArch
from megatron_bagel.config.architecture.llm import LLMArch
from megatron_bagel.config.architecture.settings import field_names, field_values
from megatron_bagel.config.architecture.top_config import read_top_config
from megatron_bagel.config.architecture.vit import ViTArch
from megatron_bagel.config.whole_numbers import require_sizes

_PARTS = {"llm", "vit", "autoencoder"}
_RELEASED_LLM = {"layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True}


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
        cls, folder: str | Path, llm: dict[str, Any] | None = None, defaults: dict[str, Any] | None = None, **overrides: Any
    ) -> BagelArch:
        """Read a folder in the released format: ``llm_config.json``, ``vit_config.json`` and, if it is usable, ``config.json``.

        A folder that does not say which layer it has is taken for the released one: MoT layers with QK-norm.

        Args:
            folder: Model folder.
            llm: Settings of the decoder that win over ``llm_config.json``.
            defaults: Settings of this class where ``config.json`` does not mention them.
            **overrides: Settings of this class that win over ``config.json``, as the original takes them from flags alone.

        Raises:
            ValueError: with the file that is missing or wrong.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"model folder {folder} does not exist")
        top = read_top_config(folder, {field.name: field.default for field in fields(cls) if field.name not in _PARTS})
        settings = {name: value for name, value in top.items() if name in field_names(cls)}
        settings.update({name: value for name, value in (defaults or {}).items() if name not in top and value is not None})
        settings.update({name: value for name, value in overrides.items() if value is not None})
        vit_file, ae_file = folder / "vit_config.json", folder / "ae.safetensors"
        has_vit, has_ae = top.get("visual_und", True) and vit_file.is_file(), top.get("visual_gen", True) and ae_file.is_file()
        vit = read_json_as(ViTArch.from_hf, vit_file, "model folder") if has_vit else None
        if vit is not None and not (vit.rope or settings.get("vit_rope")):
            settings.setdefault("vit_max_num_patch_per_side", vit.image_size // vit.patch_size)
        return cls(
            llm=read_json_as(
                lambda config: LLMArch.from_hf({**_RELEASED_LLM, **config}, **(llm or {})), folder / "llm_config.json", "model folder"
            ),
            vit=vit,
            autoencoder=AutoencoderArch.beside(ae_file) if has_ae else None,
            **settings,
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
