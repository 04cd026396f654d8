"""A model as a folder holds it, in the released layout or as a training checkpoint: its shape, its companions, and its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_bagel.checkpoint.convert import companions_of
from megatron_bagel.checkpoint.dist.step_folders import is_complete, latest_checkpoint
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import assign, entries_of, load_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder


@dataclass(frozen=True)
class OpenOptions:
    """What wins over the folder; None leaves the choice to it.

    Attributes:
        weights: "ema" or "model".
        tokenizer: another tokenizer than the folder's, or than the one that the run of a checkpoint used.
        autoencoder: the same for the autoencoder's weights.
        max_latent_size: side of the latent position table.
        interpolate_pos: whether images are spread over the whole position grid.
        check_weights: how many values of each weight are checked to be finite.
    """

    weights: str | None = None
    tokenizer: str | None = None
    autoencoder: str | None = None
    max_latent_size: int | None = None
    interpolate_pos: bool | None = None
    check_weights: WeightCheck = "sampled"


@dataclass(frozen=True)
class OpenedModel:
    """``fill`` gives modules of ``arch`` their weights; it raises ValueError for tensors that are missing or left over."""

    arch: BagelArch
    tokenizer: Tokenizer
    autoencoder: AutoEncoder | None
    fill: Callable[[Sequence[nn.Module]], None]


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint that ``path`` is, or the newest one in it; None without a complete one."""
    if is_complete(path):
        return path
    return latest_checkpoint(path) if path.is_dir() else None


def open_model(path: Path, options: OpenOptions) -> OpenedModel:
    """Open a model folder, a checkpoint, or a folder of checkpoints (the newest is taken).

    Raises:
        ValueError: there is nothing loadable at ``path``, or its tokenizer or autoencoder is not there.
    """
    if not path.is_dir():
        raise ValueError(f"--model {path} does not exist; give a folder in BAGEL's Hugging Face layout or a training checkpoint")
    if (path / "llm_config.json").is_file():
        return _open_folder(path, options)
    checkpoint = checkpoint_at(path)
    if checkpoint is None:
        raise ValueError(f"--model {path} holds neither llm_config.json (a Hugging Face folder) nor a complete training checkpoint")
    return _open_checkpoint(checkpoint, options)


def _open_folder(path: Path, options: OpenOptions) -> OpenedModel:
    flags: dict[str, Any] = {"max_latent_size": options.max_latent_size, "interpolate_pos": options.interpolate_pos}
    file = Path(options.autoencoder) if options.autoencoder else path / "ae.safetensors"
    folder = HFFolder(path, **flags)
    kinds = folder.available_weights()
    if not kinds:
        raise ValueError(f"--model {path} has neither ema.safetensors nor model.safetensors")
    source = folder.weights(options.weights or kinds[0], options.check_weights)
    stored = folder.stored_latent_size(options.weights or kinds[0])
    if options.max_latent_size is None and stored is not None:
        # The stored table says for which side the weights were trained; a config.json may be silent or stale.
        folder = HFFolder(path, **{**flags, "max_latent_size": stored})
    arch = folder.arch
    if options.autoencoder:
        arch = replace(arch, autoencoder=AutoencoderArch.beside(file))

    def fill(modules: Sequence[nn.Module]) -> None:
        load_weights(source, WeightMap(arch), modules)

    autoencoder = None
    if arch.autoencoder is not None:
        autoencoder = load_autoencoder(file, arch.autoencoder, "--autoencoder" if options.autoencoder else "--model", options.check_weights)
    return OpenedModel(arch, load_tokenizer(options.tokenizer or path, add_special=True), autoencoder, fill)


def _open_checkpoint(path: Path, options: OpenOptions) -> OpenedModel:
    stored = CheckpointWeights(path, options.check_weights)
    kind = options.weights or ("ema" if "ema" in stored.kinds() else "model")
    if kind not in stored.kinds():
        raise ValueError(f"--weights {kind}: {path} holds {' and '.join(stored.kinds())} only")
    settings = {name: value for name in ("max_latent_size", "interpolate_pos") if (value := getattr(options, name)) is not None}
    arch = replace(stored.arch, **settings)
    used = companions_of(stored.state["run"].get("config", {}))
    tokenizer = _existing(options.tokenizer, used.tokenizer, "--tokenizer", path)
    autoencoder = None
    if arch.autoencoder is not None:
        file = _existing(options.autoencoder, used.autoencoder, "--autoencoder", path)
        autoencoder = load_autoencoder(file, arch.autoencoder, "--autoencoder", options.check_weights)
    read: Callable[[str], torch.Tensor] = stored.ema if kind == "ema" else stored.model

    def fill(modules: Sequence[nn.Module]) -> None:
        for entry, parameter in entries_of(modules, WeightMap(arch)):
            assign(parameter, read(entry.name), entry)

    return OpenedModel(arch, load_tokenizer(tokenizer, add_special=True), autoencoder, fill)


def _existing(given: str | None, recorded: Path | None, flag: str, checkpoint: Path) -> Path:
    """A path given by flag, or the one the training run used."""
    path = Path(given) if given else recorded
    if path is None or not path.exists():
        raise ValueError(f"{checkpoint}: the run's {flag[2:]} ({path or 'not recorded'}) does not exist; give its location with {flag}")
    return path
