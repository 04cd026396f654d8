# SPDX-License-Identifier: Apache-2.0
"""The shape of the vision tower: a SigLIP vision transformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_bagel.config.architecture.settings import field_values, require_settings, split_settings
from megatron_bagel.config.whole_numbers import require_sizes

_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass
class ViTArch:
    """The shape of a SigLIP vision transformer as its own file describes it.

    ``num_hidden_layers`` counts all layers of the file, before ``vit_select_layer`` drops some.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    rope: bool = False
    #: Keys of the source file that this code does not interpret. They are written back unchanged.
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size", "patch_size")
        require_sizes(self, sizes, "ViT")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"ViT hidden_size {self.hidden_size} is not a multiple of its num_attention_heads {self.num_attention_heads}")
        if self.hidden_act != "gelu_pytorch_tanh":
            raise ValueError(f"ViT config has hidden_act {self.hidden_act!r}; SigLIP's gelu_pytorch_tanh is supported")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_positions(self) -> int:
        """Number of rows of the learned position table."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ViTArch:
        """Read the content of a ``vit_config.json`` of BAGEL or a ``config.json`` of SigLIP, whose ``vision_config`` counts.

        Raises:
            ValueError: for a size that is missing, and for an activation that is not SigLIP's.
        """
        vision_config = config.get("vision_config") or config
        require_settings(vision_config, _SIZES, "ViT")
        known, extra = split_settings(vision_config, cls)
        return cls(**known, extra=extra)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``vit_config.json`` of the released format."""
        return {"model_type": "siglip_vision_model", "attention_dropout": 0.0, **self.extra, **field_values(self)}
