# SPDX-License-Identifier: Apache-2.0
"""Opens a model folder in the released format or a training checkpoint: its shape, tokenizer, autoencoder and weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from megatron_bagel.checkpoint.convert import Companions, companions_of
from megatron_bagel.checkpoint.dist.adapter_reader import merged, read_adapter
from megatron_bagel.checkpoint.dist.step_folders import is_complete, latest_checkpoint
from megatron_bagel.checkpoint.dist.stored_adapter import StoredAdapter, adapter_in, identify
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.base_identity import path_of
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import assign, entries_of, load_weights
from megatron_bagel.checkpoint.hf.peft_folder import MergedSource, ReleasedAdapter
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.common.hub_names import hub_hint
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, ConfigSources
from megatron_bagel.config.architecture.weight_files import any_weight_file, describe_absence
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenOptions:
    """Choices that override those of the folder; None keeps the folder's.

    Attributes:
        weights: "ema" or "model".
        tokenizer: The path of a tokenizer that replaces the folder's, or that of the run which wrote the checkpoint.
        autoencoder: The path of autoencoder weights that replace them in the same way.
        max_latent_size: The side of the latent position table.
        interpolate_pos: Whether the positions of an image spread over the whole position grid.
        check_weights: How many values of each weight are checked to be finite.
        weights_name: The name of a weight file in a model folder that has another name than ema or model.safetensors.
        llm_path: The folder of the decoder's config, for a model folder without ``llm_config.json``. Its tokenizer serves too.
        vit_path: The folder of the vision tower's config, for a model folder without ``vit_config.json``.
        adapter: A PEFT folder or a checkpoint of adapters, which is merged into the weights as they are loaded.
        adapter_weights: "ema" or "model" of a checkpoint of adapters; None takes the average if there is one.
    """

    weights: str | None = None
    tokenizer: str | None = None
    autoencoder: str | None = None
    max_latent_size: int | None = None
    interpolate_pos: bool | None = None
    check_weights: WeightCheck = "sampled"
    weights_name: str | None = None
    llm_path: str | None = None
    vit_path: str | None = None
    adapter: str | None = None
    adapter_weights: str | None = None

    @property
    def sources(self) -> ConfigSources:
        """Where the configs and weights of a model folder are."""
        llm, vit = (Path(path) if path is not None else None for path in (self.llm_path, self.vit_path))
        autoencoder = AutoencoderArch.beside(Path(self.autoencoder)) if self.autoencoder is not None else None
        return ConfigSources(llm, vit, self.weights_name, autoencoder=autoencoder)


@dataclass(frozen=True)
class OpenedModel:
    """An opened model. ``fill`` loads the weights into modules of ``arch``; it raises ValueError for missing or unexpected tensors."""

    arch: BagelArch
    tokenizer: Tokenizer
    autoencoder: AutoEncoder | None
    fill: Callable[[Sequence[nn.Module]], None]


def checkpoint_at(path: Path) -> Path | None:
    """Return ``path`` if it is a checkpoint, else the newest checkpoint in it, or None without a complete one."""
    if is_complete(path):
        return path
    return latest_checkpoint(path) if path.is_dir() else None


def open_model(path: Path, options: OpenOptions) -> OpenedModel:
    """Open a model folder, a checkpoint, or the newest checkpoint in a folder.

    Raises:
        ValueError: ``path`` is neither, or its tokenizer or autoencoder is missing.
    """
    if not path.is_dir():
        raise ValueError(
            f"--model {path} does not exist; give a folder in BAGEL's Hugging Face format or a training checkpoint{hub_hint(str(path))}"
        )
    if (path / "llm_config.json").is_file() or any_weight_file(path, options.weights_name) is not None:
        return _open_folder(path, options)
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        raise ValueError(f"--model {path} has neither llm_config.json (a Hugging Face folder) nor a complete training checkpoint")
    return _open_checkpoint(checkpoint, options)


def _open_folder(path: Path, options: OpenOptions) -> OpenedModel:
    file = Path(options.autoencoder) if options.autoencoder else path / "ae.safetensors"
    folder = HFFolder(path, sources=options.sources, max_latent_size=options.max_latent_size, interpolate_pos=options.interpolate_pos)
    kinds = folder.available_weights()
    if not kinds:
        raise ValueError(f"--model {path} has neither ema.safetensors nor model.safetensors: {describe_absence(path, 'ema')}")
    kind = options.weights or kinds[0]
    source: TensorSource = folder.weights(kind, options.check_weights)
    arch = folder.arch
    adapter = _adapter(path, kind, arch, options)
    if adapter is not None:
        source = MergedSource(source, adapter)
    if options.autoencoder:
        arch = replace(arch, autoencoder=AutoencoderArch.beside(file))
    elif arch.autoencoder is not None and not file.is_file():
        logger.warning("%s has no ae.safetensors: pictures cannot be made or edited; give one with --autoencoder", path)
        arch = replace(arch, autoencoder=None)

    def fill(modules: Sequence[nn.Module]) -> None:
        load_weights(source, WeightMap(arch), modules)

    autoencoder = None
    if arch.autoencoder is not None:
        autoencoder = load_autoencoder(file, arch.autoencoder, "--autoencoder" if options.autoencoder else "--model", options.check_weights)
    tokenizer = options.tokenizer or (path if (path / "llm_config.json").is_file() else options.llm_path or path)
    return OpenedModel(arch, load_tokenizer(tokenizer, add_special=True), autoencoder, fill)


def _open_checkpoint(path: Path, options: OpenOptions) -> OpenedModel:
    stored = CheckpointWeights(path, options.check_weights)
    own_adapter = adapter_in(stored.state)
    if own_adapter is not None:
        return _open_base(path, own_adapter, options)
    kind = options.weights or ("ema" if "ema" in stored.kinds() else "model")
    if kind not in stored.kinds():
        raise ValueError(f"--weights {kind}: {path} has only {' and '.join(stored.kinds())} weights")
    settings = {name: value for name in ("max_latent_size", "interpolate_pos") if (value := getattr(options, name)) is not None}
    arch = replace(stored.arch, **settings)
    recorded = companions_of(stored.state["run"].get("config", {}))
    companions = Companions(
        None if options.tokenizer else recorded.tokenizer, None if options.autoencoder or arch.autoencoder is None else recorded.autoencoder
    ).on_this_machine()
    tokenizer = _existing(options.tokenizer, companions.tokenizer, "--tokenizer", path)
    autoencoder = None
    if arch.autoencoder is not None:
        file = _existing(options.autoencoder, companions.autoencoder, "--autoencoder", path)
        autoencoder = load_autoencoder(file, arch.autoencoder, "--autoencoder", options.check_weights)
    read: Callable[[str], torch.Tensor] = stored.ema if kind == "ema" else stored.model
    adapter = _adapter(path, kind, arch, options)

    def fill(modules: Sequence[nn.Module]) -> None:
        for entry, parameter in entries_of(modules, WeightMap(arch)):
            full = read(entry.name)
            assign(parameter, full if adapter is None else merged(adapter, entry, full), entry)

    return OpenedModel(arch, load_tokenizer(tokenizer, add_special=True), autoencoder, fill)


def _adapter(base: Path, kind: str, arch: BagelArch, options: OpenOptions) -> ReleasedAdapter | None:
    """Return the adapter of the options, or None. Raises ValueError if it belongs to other weights than ``kind`` of ``base``."""
    if options.adapter is None:
        return None
    adapter = read_adapter(Path(options.adapter), options.adapter_weights)
    adapter.check_names(WeightMap(arch).by_hf)
    if adapter.base is None:
        logger.warning("%s does not say which weights it belongs to: whether they are those of %s is not checked", adapter.source, base)
    else:
        adapter.base.check(identify(base, kind, adapter.base.weights_name), adapter.source)
    return adapter


def _open_base(checkpoint: Path, stored: StoredAdapter, options: OpenOptions) -> OpenedModel:
    """Open the base of a checkpoint of adapters, with these adapters."""
    if options.adapter is not None:
        raise ValueError(f"--model {checkpoint} is a checkpoint of adapters already; give its base with --model to use --adapter")
    base = stored.base
    of_base = replace(options, weights=base.weights, weights_name=base.weights_name)
    path = path_of(base, None, f"give it as --model, where it is now, and {checkpoint} as --adapter")
    return open_model(path, replace(of_base, adapter=str(checkpoint), adapter_weights=options.weights))


def _existing(path_from_flag: str | None, recorded_path: Path | None, flag: str, checkpoint: Path) -> Path:
    """Return the path that ``flag`` gives, or the one that the training run used. Raises ValueError if it does not exist."""
    path = Path(path_from_flag) if path_from_flag else recorded_path
    if path is None or not path.exists():
        raise ValueError(f"{checkpoint}: the run's {flag[2:]} ({path or 'not recorded'}) does not exist; give its location with {flag}")
    return path
