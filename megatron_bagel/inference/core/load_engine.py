# SPDX-License-Identifier: Apache-2.0
"""Builds an ``Engine`` from a folder on disk: a Hugging Face folder in the released format, or a training checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_bagel import platform
from megatron_bagel.assembly.hub_models import hub_folders
from megatron_bagel.assembly.opened_model import OpenOptions, open_model
from megatron_bagel.assembly.whole_modules import filled_modules
from megatron_bagel.checkpoint.hf.hub import ADAPTER_FILES, ADAPTER_WEIGHTS, HubRequest
from megatron_bagel.common.dtypes import SHORT
from megatron_bagel.common.folder_files import AUTOENCODER_CONFIG_FILES
from megatron_bagel.common.hub_names import HubName, hub_name
from megatron_bagel.common.safetensors_header import AUTOENCODER_FILE
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.architecture.weight_files import WEIGHT_KINDS
from megatron_bagel.data.transforms import TransformArgs
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.platform.launch.process_group import init_distributed, launched_world_size

# (longest side, shortest side) in pixels of input images, BAGEL's defaults.
VAE_SIDES = (1024, 512)
VIT_SIDES = (980, 224)
DTYPES = SHORT


@dataclass(frozen=True)
class LoadOptions(OpenOptions):
    """What to load and how. ``None`` leaves the choice to the folder, or to what the machine does best.

    Attributes:
        dtype: "fp32" or "bf16" (default: bf16 on a GPU, fp32 on a CPU, where bf16 is slow).
        vae_transform: (longest, shortest) side in pixels of input images for the autoencoder.
        vit_transform: the same for the vision tower.
        tensor_parallel: ranks that share the decoder; a run on more ranks has several copies of the model.
        expert_parallel: parts of these ranks that divide sparse experts; the ranks of a part split each of its experts.
    """

    dtype: str | None = None
    vae_transform: tuple[int, int] | None = None
    vit_transform: tuple[int, int] | None = None
    tensor_parallel: int = 1
    expert_parallel: int = 1


def load_engine(path: str | Path, options: LoadOptions | None = None) -> Engine:
    """Load a model for inference from an HF folder, a checkpoint folder, or a folder of checkpoints (the newest is used).

    Raises:
        ValueError: If ``path`` holds no model, tensors are missing or unexpected, or settings do not match the model.
    """
    options = options or LoadOptions()
    _join(options.tensor_parallel, options.expert_parallel)
    model = open_model(*_on_this_machine(str(path), options))
    if len(model.tokenizer) > model.arch.llm.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(model.tokenizer)} ids, but the model's vocabulary only {model.arch.llm.vocab_size} rows: not a pair. "
            "Give the tokenizer that the model was trained with (--tokenizer); megatron-bagel train --grow_vocabulary True gives new "
            "tokens rows"
        )
    dtype = _dtype(options)
    transforms = image_transforms(model.arch, options.vae_transform, options.vit_transform)
    decoder, vision_tower = filled_modules(model, dtype)
    return Engine(decoder, vision_tower, model.autoencoder, model.tokenizer, model.arch, *transforms)


def _on_this_machine(path: str, options: LoadOptions) -> tuple[Path, LoadOptions]:
    """Return path and options with folders in place of models on a hub. Collective."""
    kinds = (options.weights,) if options.weights is not None else WEIGHT_KINDS
    needs = {
        "model": HubRequest(
            "--model", HubName(""), weights=kinds, first_only=True, weights_name=options.weights_name,
            autoencoder="wanted" if options.autoencoder is None else "no",
        ),
        **{name: HubRequest(f"--{name.replace('_', '-')}", HubName("")) for name in ("tokenizer", "llm_path", "vit_path")},
        "autoencoder": HubRequest("--autoencoder", HubName(""), files=AUTOENCODER_CONFIG_FILES, autoencoder="needed"),
        "adapter": HubRequest("--adapter", HubName(""), files=ADAPTER_FILES, weights=ADAPTER_WEIGHTS),
    }  # fmt: skip
    texts = {name: path if name == "model" else getattr(options, name) for name in needs}
    names = {key: name for key, text in texts.items() if text is not None and (name := hub_name(text)) is not None}
    if not names:
        return Path(path), options
    folders = hub_folders([replace(needs[key], name=name) for key, name in names.items()])
    paths: dict[str, Any] = {key: str(folder.path) for key, folder in zip(names, folders, strict=True)}
    if "autoencoder" in paths:
        paths["autoencoder"] = f"{paths['autoencoder']}/{AUTOENCODER_FILE}"
    return Path(paths.pop("model", path)), replace(options, **paths)


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


def _join(tensor_parallel: int, expert_parallel: int) -> None:
    """Create the process groups that Megatron-Core's modules need even on one process; existing groups stay.

    Raises ValueError if ``tensor_parallel`` does not divide the launched ranks, or ``expert_parallel`` does not divide it.
    """
    ranks = launched_world_size()
    if tensor_parallel < 1 or ranks % tensor_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor_parallel} does not divide the {ranks} launched processes; start it with "
            f"torchrun --nproc_per_node {max(tensor_parallel, 1)}, or a multiple of that"
        )
    if expert_parallel < 1 or tensor_parallel % expert_parallel:
        raise ValueError(
            f"--expert-model-parallel-size {expert_parallel} does not divide --tensor-model-parallel-size {tensor_parallel}: sparse "
            "experts are divided over the ranks that share a copy of the model"
        )
    platform.install()
    if not torch.distributed.is_initialized():
        init_distributed()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_parallel, expert_model_parallel_size=expert_parallel, expert_tensor_parallel_size=tensor_parallel // expert_parallel
        )


def _dtype(options: LoadOptions) -> torch.dtype:
    name = options.dtype or ("bf16" if platform.has_gpu() else "fp32")
    if name not in DTYPES:
        raise ValueError(f"--dtype {name} is unknown; choose {' or '.join(DTYPES)}")
    return DTYPES[name]
