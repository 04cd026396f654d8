"""From a run's settings to modules with weights: which architecture, where the first weights come from, what stays frozen.

Weights never come from chance unless ``--init_random`` says so: every source is strict about what it holds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_bagel import platform
from megatron_bagel.assembly.meta_init import materialize, on_meta
from megatron_bagel.checkpoint.dist.state import load_weights_only
from megatron_bagel.checkpoint.dist.step_folders import is_complete, latest_checkpoint, unusable_only
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.initial_weights import InitialWeights, initial_value
from megatron_bagel.checkpoint.hf.load import load_weights
from megatron_bagel.checkpoint.hf.pretrained import grown_vocabulary
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.parallel_sizes import encoders_on_all_ranks
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import architecture, tokenizer_path
from megatron_bagel.costs.freezing import freeze
from megatron_bagel.data.tokenizer import Tokenizer, load_tokenizer
from megatron_bagel.encoders.autoencoder import AutoEncoder
from megatron_bagel.encoders.autoencoder_io import load_autoencoder
from megatron_bagel.encoders.cached_latents import CachedPosterior
from megatron_bagel.encoders.vision_tower import VisionTower
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.build import build_decoder
from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing

logger = logging.getLogger(__name__)


@dataclass
class Modules:
    """The parts of a model on this rank, not wrapped yet: a pipeline stage has one decoder chunk, or several when interleaved.

    ``tower`` and ``autoencoder`` are on every rank or, with ``--encoder-placement first_stage``, ``tower`` on the first stage alone,
    ``autoencoder`` on the first, which reads latents, and the last, which aims at them.
    """

    decoder: list[BagelModel]
    tower: VisionTower | None
    autoencoder: AutoEncoder | CachedPosterior | None

    @property
    def named(self) -> dict[str, nn.Module]:
        """Names as checkpoints use them."""
        if len(self.decoder) == 1:
            named: dict[str, nn.Module] = {"decoder": self.decoder[0]}
        else:
            named = {f"decoder.{number}": chunk for number, chunk in enumerate(self.decoder)}
        return {**named, **({"vision": self.tower} if self.tower is not None else {})}


def run_model(config: Config) -> tuple[BagelArch, Tokenizer]:
    """Architecture and tokenizer of a run; the vocabulary holds every token of the tokenizer."""
    tokenizer = load_tokenizer(tokenizer_path(config))
    return grown_vocabulary(architecture(config), len(tokenizer)), tokenizer


def build_modules(config: Config, arch: BagelArch, tcfg: TransformerConfig, shapes_only: bool = False) -> Modules:
    """Modules of this rank on its device, without meaningful weights; the autoencoder with its own. With ``shapes_only`` no tensor has
    memory and no file of weights is read."""
    device = torch.device("meta") if shapes_only else platform.device()
    initialize_kv_sharing(arch.llm.num_key_value_heads)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    everywhere = encoders_on_all_ranks(config.megatron)
    # Transformer Engine's layers allocate on the GPU whatever is asked for.
    with on_meta() if config.megatron.transformer_impl == "local" else nullcontext():
        decoder = [_build_chunk(config, arch, tcfg, vp_stage) for vp_stage in range(tcfg.virtual_pipeline_model_parallel_size or 1)]
        tower = VisionTower(arch, recompute=config.megatron.recompute_vit) if arch.vit is not None and (first or everywhere) else None
    autoencoder = None
    if arch.autoencoder is not None and (first or last or everywhere):
        with on_meta() if shapes_only else nullcontext():
            autoencoder = AutoEncoder(arch.autoencoder) if shapes_only else _autoencoder(config, arch).to(device)
    for part in (*decoder, *([tower] if tower is not None else [])):
        materialize(part, device, tcfg.params_dtype)
    return Modules(decoder, tower, autoencoder)


def _autoencoder(config: Config, arch: BagelArch) -> AutoEncoder | CachedPosterior:
    """The autoencoder with its weights or, where a latent cache holds what it would make, its place holder."""
    if config.data.latent_cache is not None:
        return CachedPosterior(arch.autoencoder)
    return load_autoencoder(autoencoder_path(config), arch.autoencoder)


def autoencoder_path(config: Config) -> Path:
    """The file of the autoencoder's weights; a run with a latent cache does without it."""
    return Path(config.model.model_path) / "ae.safetensors" if config.training.finetune_from_hf else Path(config.model.vae_path)


def _build_chunk(config: Config, arch: BagelArch, tcfg: TransformerConfig, number: int) -> BagelModel:
    """Chunk ``number`` of this rank's pipeline stage."""
    interleaved = tcfg.virtual_pipeline_model_parallel_size is not None
    place = {"ignore_virtual": False, "vp_stage": number} if interleaved else {}
    return build_decoder(
        arch,
        tcfg,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        vp_stage=number if interleaved else None,
        freeze_und=config.training.freeze_und,
        transformer_impl=config.megatron.transformer_impl,
        vocab_divisor=config.megatron.make_vocab_size_divisible_by,
    )


def freeze_modules(config: Config, modules: Modules) -> None:
    """Apply the freeze flags; frozen weights then stay out of gradient and optimizer memory."""
    training = config.training
    for number, chunk in enumerate(modules.decoder):
        tower = modules.tower if number == 0 else None
        freeze(chunk, tower, training.freeze_llm, training.freeze_vit, training.freeze_und)


@dataclass(frozen=True)
class WeightSource:
    """Where a run starts. ``checkpoint`` continues everything; else ``weights`` ("model" or "ema") of ``folder``, else pretrained parts."""

    checkpoint: Path | None = None
    folder: Path | None = None
    weights: str = "model"

    def describe(self, config: Config) -> str:
        """One sentence for the log."""
        if self.checkpoint is not None:
            return f"continuing from {self.checkpoint}"
        if self.folder is not None:
            return f"starting from the {self.weights} weights of {self.folder}"
        if config.model.init_random:
            return f"starting from random weights (--init_random, seed {config.training.global_seed})"
        return f"starting from {config.model.llm_path} and {config.model.vit_path if config.training.visual_und else 'no ViT'}"


def weight_source(config: Config, damaged: Sequence[Path] = ()) -> WeightSource:
    """Decide from the resume flags, the newest checkpoint that is not in ``damaged`` winning with ``auto_resume`` as in the original.

    Raises ValueError for a ``resume_from`` that is neither a checkpoint nor a model folder, and for a run whose checkpoints are all
    damaged: it must not begin anew unnoticed.
    """
    training = config.training
    if training.auto_resume:
        newest = latest_checkpoint(training.checkpoint_dir, excluded=damaged)
        if newest is not None:
            return WeightSource(checkpoint=newest)
        gone = {*damaged, *unusable_only(training.checkpoint_dir)}
        if gone:
            raise ValueError(
                f"no checkpoint in {training.checkpoint_dir} can be used: {', '.join(sorted(map(str, gone)))}. Copy one of them again, or "
                "remove them to start anew"
            )
    if training.resume_from is None:
        return WeightSource()
    path = Path(training.resume_from)
    checkpoint = path if is_complete(path) else latest_checkpoint(path) if path.is_dir() else None
    if checkpoint is not None:
        if training.resume_model_only:
            return WeightSource(folder=checkpoint, weights="ema" if training.finetune_from_ema else "model")
        return WeightSource(checkpoint=checkpoint)
    folder = HFFolder(path)
    if not training.resume_model_only:
        raise ValueError(
            f"--resume_from {path} is a model folder: it has weights, but no optimizer state, step or data position to resume. "
            "Pass --resume_model_only True to start from its weights"
        )
    return WeightSource(folder=path, weights=_stored(folder, training.finetune_from_ema))


def _stored(folder: HFFolder, ema: bool) -> str:
    """Which file to take: the one asked for, or the only one there (a released folder has EMA weights alone)."""
    available = folder.available_weights()
    if ema or available == ["ema"]:
        return "ema"
    return "model"


def load_first_weights(config: Config, source: WeightSource, modules: Modules, arch: BagelArch) -> None:
    """Fill the modules for a run that does not continue a checkpoint."""
    parts = list(modules.named.values())
    if source.folder is not None:
        load_folder(config, source.folder, source.weights, modules, arch)
        return
    model = config.model
    llm, vit = (None, None) if model.init_random else (model.llm_path, model.vit_path)
    training = config.training
    InitialWeights.of(arch, training.global_seed, llm, vit, model.allow_missing, training.copy_init_moe).fill(parts)


def average_source(source: WeightSource) -> str | None:
    """ "ema" when a model-only start finds an average of its own beside the weights it takes, as the original loads both."""
    if source.folder is None or source.weights == "ema":
        return None
    if is_complete(source.folder):
        return "ema"
    return "ema" if "ema" in HFFolder(source.folder).available_weights() else None


def load_folder(config: Config, folder: Path, weights: str, modules: Modules, arch: BagelArch) -> None:
    """Fill the modules from a checkpoint or a model folder, weights only."""
    seeded = partial(initial_value, arch=arch, seed=config.training.global_seed)
    if is_complete(folder):
        load_weights_only(folder, modules.named, arch, weights, config.model.allow_missing, seeded)
        return
    parts = list(modules.named.values())
    load_weights(HFFolder(folder).weights(weights), WeightMap(arch), parts, config.model.allow_missing, initial_value=seeded)
