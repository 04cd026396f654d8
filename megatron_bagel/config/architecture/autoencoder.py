# SPDX-License-Identifier: Apache-2.0
"""The shape of the image autoencoder, read from and written to ``ae_config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_bagel.common.json_files import read_json_as
from megatron_bagel.config.architecture.settings import field_names, field_values
from megatron_bagel.config.whole_numbers import require_sizes


@dataclass
class AutoencoderArch:
    """The shape of a FLUX autoencoder, by default the released one. A file ``ae_config.json`` beside the weights overrides it."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    in_channels: int = 3
    out_ch: int = 3
    resolution: int = 256
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        require_sizes(self, ("ch", "num_res_blocks", "z_channels", "in_channels", "out_ch"), "autoencoder")
        self.ch_mult = tuple(self.ch_mult)
        if self.ch % 32:
            raise ValueError(f"autoencoder ch {self.ch} must be a multiple of 32, the number of GroupNorm groups")

    @property
    def downsample(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> AutoencoderArch:
        """Read the content of an ``ae_config.json``. A ``downsample`` key is checked, not stored.

        Raises:
            ValueError: for a key that is unknown, and for a ``downsample`` that does not follow from ``ch_mult``.
        """
        known_names = field_names(cls)
        unknown_names = sorted(set(config) - known_names - {"downsample"})
        if unknown_names:
            raise ValueError(f"autoencoder config has unknown keys {', '.join(unknown_names)}; known are {', '.join(sorted(known_names))}")
        arch = cls(**{name: value for name, value in config.items() if name in known_names})
        if config.get("downsample", arch.downsample) != arch.downsample:
            raise ValueError(f"autoencoder config says downsample {config['downsample']}; ch_mult {arch.ch_mult} gives {arch.downsample}")
        return arch

    def to_dict(self) -> dict[str, Any]:
        """Return the content of an ``ae_config.json``."""
        return {**field_values(self), "ch_mult": list(self.ch_mult), "downsample": self.downsample}

    @classmethod
    def beside(cls, weights: Path) -> AutoencoderArch:
        """Return the shape of the autoencoder whose weights are a file: its ``ae_config.json``, or FLUX's shape without one."""
        path = Path(weights).parent / "ae_config.json"
        return read_json_as(cls.from_dict, path, "autoencoder") if path.is_file() else cls()
