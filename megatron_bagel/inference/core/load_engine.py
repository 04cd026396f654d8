"""Builds an ``Engine`` from a folder on disk: a Hugging Face folder in the released format, or a training checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_bagel import platform
from megatron_bagel.checkpoint.convert import companions_of
from megatron_bagel.checkpoint.dist import step_folders
from megatron_bagel.checkpoint.dist.tensor_reader import CheckpointWeights
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import assign, entries_of, load_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.common.dtypes import SHORT
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import check_parallel_sizes
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.data.transforms import TransformArgs
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.model.build import build_decoder
from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing
from megatron_bagel.platform.launch.process_group import init_distributed, launched_world_size

# (longest side, shortest side) in pixels of input images, BAGEL's defaults.
VAE_SIDES = (1024, 512)
VIT_SIDES = (980, 224)
DTYPES = SHORT


@dataclass(frozen=True)
class LoadOptions:
    """What to load and how. ``None`` leaves the choice to the folder, or to the machine.

    ``weights`` is "ema" or "model"; ``dtype`` is "fp32" or "bf16" (default: bf16 on a GPU, fp32 on a CPU, where bf16 is slow).
    ``vae_transform`` and ``vit_transform`` are the (longest, shortest) side in pixels of input images for the autoencoder and the
    vision tower. ``max_latent_size`` and ``interpolate_pos`` replace the folder's settings. ``tensor_parallel`` ranks share the
    decoder; a run on more ranks has several copies of the model.
    """

    weights: str | None = None
    dtype: str | None = None
    tokenizer: str | None = None
    autoencoder: str | None = None
    vae_transform: tuple[int, int] | None = None
    vit_transform: tuple[int, int] | None = None
    max_latent_size: int | None = None
    interpolate_pos: bool | None = None
    tensor_parallel: int = 1


def load_engine(path: str | Path, options: LoadOptions | None = None) -> Engine:
    """Load a model for inference from an HF folder, a checkpoint folder, or a folder of checkpoints (the newest is used).

    Raises:
        ValueError: If ``path`` holds no model, tensors are missing or unexpected, or settings do not match the model.
    """
    options = options or LoadOptions()
    path = Path(path)
    _join(options.tensor_parallel)
    if not path.is_dir():
        raise ValueError(f"--model {path} does not exist; give a folder in BAGEL's Hugging Face format or a training checkpoint")
    if (path / "llm_config.json").is_file():
        return _from_hf(path, options)
    checkpoint = path if step_folders.is_complete(path) else step_folders.latest_checkpoint(path)
    if checkpoint is None:
        raise ValueError(f"--model {path} holds neither llm_config.json (a Hugging Face folder) nor a complete training checkpoint")
    return _from_checkpoint(checkpoint, options)


def image_transforms(
    arch: BagelArch, vae_transform: tuple[int, int] | None, vit_transform: tuple[int, int] | None
) -> tuple[TransformArgs, TransformArgs]:
    """Return the transforms of input images for the autoencoder and the vision tower.

    Default sides are lowered to the limit of the model's position tables; requested sides above it are an error.
    """
    vit_patch = arch.vit.patch_size if arch.vit else 14
    vae_limit = _PositionLimit("max_latent_size", arch.vae_token_pixels, arch.max_latent_size)
    vit_limit = _PositionLimit("vit_max_num_patch_per_side", vit_patch, arch.vit_max_num_patch_per_side)
    return (
        _transform("--vae-transform", VAE_SIDES, vae_transform, vae_limit),
        _transform("--vit-transform", VIT_SIDES, vit_transform, vit_limit),
    )


@dataclass(frozen=True)
class _PositionLimit:
    """The limit of a position table: ``tokens`` per side of ``stride`` pixels, by the setting ``name``."""

    name: str
    stride: int
    tokens: int


def _transform(flag: str, default: tuple[int, int], requested: tuple[int, int] | None, position_limit: _PositionLimit) -> TransformArgs:
    limit = position_limit.stride * position_limit.tokens
    if requested is None:
        longest = min(default[0], limit)
        return TransformArgs(longest, min(default[1], longest), position_limit.stride)
    args = TransformArgs(requested[0], requested[1], position_limit.stride)
    if args.longest_side > limit:
        raise ValueError(
            f"{flag} {requested[0]} {requested[1]}: images of {args.longest_side} pixels exceed the {limit} that "
            f"{position_limit.name} {position_limit.tokens} allows"
        )
    return args


def _join(tensor_parallel: int) -> None:
    """Create the process groups that Megatron-Core's modules need even on one process; existing groups stay.

    Raises ValueError if ``tensor_parallel`` does not divide the launched ranks.
    """
    ranks = launched_world_size()
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor_parallel} does not divide the {ranks} launched processes; start it with "
            f"torchrun --nproc_per_node {max(tensor_parallel, 1)}, or a multiple of that"
        )
    platform.install()
    if not torch.distributed.is_initialized():
        init_distributed()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_parallel)


def _dtype(options: LoadOptions) -> torch.dtype:
    name = options.dtype or ("bf16" if platform.has_gpu() else "fp32")
    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is unknown; choose {' or '.join(DTYPES)}")
    return DTYPES[name]


def _from_hf(path: Path, options: LoadOptions) -> Engine:
    flags = {"max_latent_size": options.max_latent_size, "interpolate_pos": options.interpolate_pos}
    ae_file = Path(options.autoencoder) if options.autoencoder else path / "ae.safetensors"
    folder = HFFolder(path, **flags)
    kinds = folder.available_weights()
    if not kinds:
        raise ValueError(f"--model {path} has neither ema.safetensors nor model.safetensors")
    source = folder.weights(options.weights or kinds[0])
    stored_size = folder.stored_latent_size(options.weights or kinds[0])
    if options.max_latent_size is None and stored_size is not None:
        # The stored table shows the side that the weights were trained for; a config.json may be silent or stale.
        folder = HFFolder(path, **{**flags, "max_latent_size": stored_size})
    arch = folder.arch
    if options.autoencoder:
        arch = replace(arch, autoencoder=AutoencoderArch.beside(ae_file))

    def fill(modules: list[nn.Module]) -> None:
        load_weights(source, WeightMap(arch), modules)

    autoencoder = None
    if arch.autoencoder is not None:
        autoencoder = load_autoencoder(ae_file, arch.autoencoder, "--autoencoder" if options.autoencoder else "--model")
    return _assemble(arch, fill, load_tokenizer(options.tokenizer or path, add_special=True), autoencoder, options)


def _from_checkpoint(path: Path, options: LoadOptions) -> Engine:
    weights_reader = CheckpointWeights(path)
    kind = options.weights or ("ema" if "ema" in weights_reader.kinds() else "model")
    if kind not in weights_reader.kinds():
        raise ValueError(f"--weights {kind}: {path} holds {' and '.join(weights_reader.kinds())} only")
    arch = weights_reader.arch
    settings = {name: value for name in ("max_latent_size", "interpolate_pos") if (value := getattr(options, name)) is not None}
    arch = replace(arch, **settings)
    companions = companions_of(weights_reader.state["run"].get("config", {}))
    tokenizer = _existing(options.tokenizer, companions.tokenizer, "--tokenizer", path)
    autoencoder = None
    if arch.autoencoder is not None:
        file = _existing(options.autoencoder, companions.autoencoder, "--autoencoder", path)
        autoencoder = load_autoencoder(file, arch.autoencoder, "--autoencoder")
    read_weight: Callable[[str], torch.Tensor] = weights_reader.ema if kind == "ema" else weights_reader.model

    def fill(modules: list[nn.Module]) -> None:
        for entry, parameter in entries_of(modules, WeightMap(arch)):
            assign(parameter, read_weight(entry.name), entry)

    return _assemble(arch, fill, load_tokenizer(tokenizer, add_special=True), autoencoder, options)


def _existing(flag_value: str | None, recorded: Path | None, flag: str, checkpoint: Path) -> Path:
    """Return the path of the flag if given, or the one the training run used."""
    path = Path(flag_value) if flag_value else recorded
    if path is None or not path.exists():
        raise ValueError(f"{checkpoint}: the run's {flag[2:]} ({path or 'not recorded'}) does not exist; give its location with {flag}")
    return path


def _assemble(
    arch: BagelArch, fill: Callable[[list[nn.Module]], None], tokenizer: Tokenizer, autoencoder: AutoEncoder | None, options: LoadOptions
) -> Engine:
    if len(tokenizer) > arch.llm.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, but the model's vocabulary only {arch.llm.vocab_size} rows: they do not match"
        )
    dtype, device = _dtype(options), platform.device()
    vae_transform, vit_transform = image_transforms(arch, options.vae_transform, options.vit_transform)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    megatron = MegatronArguments(tensor_model_parallel_size=ranks)
    check_parallel_sizes(megatron, arch.llm)
    # Random weights would be overwritten. Megatron marks weights that ranks share only if it initialises them.
    no_initialisation: dict[str, Any] = {
        "init_method": _unchanged,
        "output_layer_init_method": _unchanged,
        "perform_initialization": ranks > 1,
    }
    config = transformer_config(arch.llm, megatron, bf16=dtype is torch.bfloat16, on_cpu=not platform.has_gpu(), **no_initialisation)
    initialize_kv_sharing(arch.llm.num_key_value_heads)
    decoder = build_decoder(arch, config)
    vision_tower = VisionTower(arch) if arch.vit else None
    modules: list[nn.Module] = [module for module in (decoder, vision_tower) if module is not None]
    fill(modules)
    for module in modules:
        module.to(device, dtype).eval().requires_grad_(False)
    if autoencoder is not None:
        autoencoder.to(device)
    return Engine(decoder, vision_tower, autoencoder, tokenizer, arch, vae_transform, vit_transform)


def _unchanged(weight: torch.Tensor) -> torch.Tensor:
    """Leave weights uninitialised that are about to be loaded."""
    return weight
