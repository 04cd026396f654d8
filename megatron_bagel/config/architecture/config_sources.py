# SPDX-License-Identifier: Apache-2.0
"""Where the JSON of a model folder is: in the folder, or in the pretrained folders that it was trained from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_bagel.config.architecture.autoencoder import AutoencoderArch


@dataclass(frozen=True)
class ConfigSources:
    """Choices for a folder that is not complete, such as a checkpoint of the original trainer, which holds weights alone.

    Attributes:
        llm_path: Folder of the decoder's config, used if the model folder has no ``llm_config.json``.
        vit_path: Folder of the vision tower's config, used if the model folder has no ``vit_config.json``.
        weights_name: Name of the weight file whose tensors show sizes; None takes the ema or model weights.
        weights_folder: Folder of that file, if the weights come from another model folder.
        autoencoder: The autoencoder, if it is not the one in the folder.
    """

    llm_path: Path | None = None
    vit_path: Path | None = None
    weights_name: str | None = None
    weights_folder: Path | None = None
    autoencoder: AutoencoderArch | None = None

    def llm_config(self, folder: Path) -> Path:
        """Return the file of the decoder's config. Raises ValueError if there is none."""
        file = _first_file((folder, "llm_config.json"), (self.llm_path, "llm_config.json"), (self.llm_path, "config.json"))
        if file is not None:
            return file
        if self.llm_path is not None:
            raise ValueError(f"--llm_path: there is no file {self.llm_path / 'config.json'}")
        raise ValueError(f"model folder: there is no file {folder / 'llm_config.json'}; {_advice(folder)}")

    def vit_config(self, folder: Path) -> Path | None:
        """Return the file of the vision tower's config, or None without one. Raises ValueError if ``vit_path`` has none."""
        file = _first_file((folder, "vit_config.json"), (self.vit_path, "vit_config.json"), (self.vit_path, "config.json"))
        if file is None and self.vit_path is not None:
            raise ValueError(f"--vit_path: there is no file {self.vit_path / 'config.json'}")
        return file


def _advice(folder: Path) -> str:
    snapshots = sorted(folder.glob("snapshots/*/llm_config.json"))
    if snapshots:
        return f"this is the root of a hub cache: give {snapshots[-1].parent}"
    return "a checkpoint of the original trainer has none: give the folder of the pretrained decoder with --llm_path"


def _first_file(*candidates: tuple[Path | None, str]) -> Path | None:
    files = (folder / name for folder, name in candidates if folder is not None)
    return next((file for file in files if file.is_file()), None)
