"""From a folder on disk to an ``Engine``: a Hugging Face folder in the released layout, or a training checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_bagel import platform
from megatron_bagel.assembly.opened_model import OpenOptions, open_model
from megatron_bagel.assembly.whole_modules import filled_modules
from megatron_bagel.common.dtypes import SHORT
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.data.transforms import TransformArgs
from megatron_bagel.inference.core.engine import Engine
from megatron_bagel.platform.launch.process_group import init_distributed, launched_world_size

# (longest side, shortest side) in pixels of input images, BAGEL's own.
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
    """

    dtype: str | None = None
    vae_transform: tuple[int, int] | None = None
    vit_transform: tuple[int, int] | None = None
    tensor_parallel: int = 1


def load_engine(path: str | Path, options: LoadOptions | None = None) -> Engine:
    """A model ready for inference from an HF folder, a checkpoint folder, or a folder of checkpoints (the newest is taken).

    Raises:
        ValueError: nothing loadable at ``path``, missing or left-over tensors, or settings that do not fit the model.
    """
    options = options or LoadOptions()
    _join(options.tensor_parallel)
    model = open_model(Path(path), options)
    if len(model.tokenizer) > model.arch.llm.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(model.tokenizer)} ids, but the model's vocabulary only {model.arch.llm.vocab_size} rows: not a pair"
        )
    dtype = _dtype(options)
    transforms = image_transforms(model.arch, options.vae_transform, options.vit_transform)
    decoder, vision_tower = filled_modules(model, dtype)
    return Engine(decoder, vision_tower, model.autoencoder, model.tokenizer, model.arch, *transforms)


def image_transforms(
    arch: BagelArch, vae_transform: tuple[int, int] | None, vit_transform: tuple[int, int] | None
) -> tuple[TransformArgs, TransformArgs]:
    """Transforms of input images for the autoencoder and the vision tower.

    BAGEL's own sides are lowered to what the model's position tables reach; sides that were asked for are refused instead.
    """
    vit_patch = arch.vit.patch_size if arch.vit else 14
    vae_reach = _Reach("max_latent_size", arch.vae_token_pixels, arch.max_latent_size)
    vit_reach = _Reach("vit_max_num_patch_per_side", vit_patch, arch.vit_max_num_patch_per_side)
    return (
        _transform("--vae-transform", VAE_SIDES, vae_transform, vae_reach),
        _transform("--vit-transform", VIT_SIDES, vit_transform, vit_reach),
    )


@dataclass(frozen=True)
class _Reach:
    """How far a position table reaches: ``tokens`` per side of ``stride`` pixels, by the setting ``name``."""

    name: str
    stride: int
    tokens: int


def _transform(flag: str, usual: tuple[int, int], asked: tuple[int, int] | None, reach: _Reach) -> TransformArgs:
    limit = reach.stride * reach.tokens
    if asked is None:
        longest = min(usual[0], limit)
        return TransformArgs(longest, min(usual[1], longest), reach.stride)
    args = TransformArgs(asked[0], asked[1], reach.stride)
    if args.longest_side > limit:
        raise ValueError(
            f"{flag} {asked[0]} {asked[1]}: images of {args.longest_side} pixels exceed the {limit} that {reach.name} {reach.tokens} allows"
        )
    return args


def _join(tensor_parallel: int) -> None:
    """Process groups for Megatron-Core's modules, which need them even on one process; groups that exist are kept.

    Raises ValueError when the launched ranks are no multiple of ``tensor_parallel``.
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
