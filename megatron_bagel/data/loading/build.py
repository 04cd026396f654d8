"""Builds a run's loader from its settings: which groups take part, which index holds them, how samples become packs.

Only this module reads the data flags. It knows ranks only as this replica's number and the number of replicas.
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch
from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.config.parser import Config
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import MANIFEST
from megatron_bagel.data.index.latent_cache import LatentCache
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.index.train_val_split import Part, TrainValSplit
from megatron_bagel.data.loading.encoder_assignment import EncodingShare
from megatron_bagel.data.loading.loader import PackLoader, PackReader
from megatron_bagel.data.planner.cost_model import CostModel
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings, open_sources
from megatron_bagel.data.planner.planner import Planner, PlannerConfig
from megatron_bagel.data.planner.sample_plan import ConditionDropout, active_groups
from megatron_bagel.data.sources.dataset_config import GroupConfig, load_groups
from megatron_bagel.data.tokenizer import Tokenizer
from megatron_bagel.layout.pack import LayoutSpec

log = logging.getLogger(__name__)


def layout_spec(arch: BagelArch, tokenizer: Tokenizer) -> LayoutSpec:
    """Return what the layout needs to know of the model and its tokens."""
    return LayoutSpec(
        bos=tokenizer.bos,
        eos=tokenizer.eos,
        start_of_image=tokenizer.start_of_image,
        end_of_image=tokenizer.end_of_image,
        vit_patch=arch.vit.patch_size if arch.vit is not None else 14,
        vit_max_side=arch.vit_max_num_patch_per_side,
        vae_downsample=arch.vae_token_pixels,
        max_latent_size=arch.max_latent_size,
        interpolate_pos=arch.interpolate_pos,
    )


def training_groups(config: Config) -> list[GroupConfig]:
    """Return the dataset groups this run trains on. The log names those that ``visual_gen`` and ``visual_und`` leave out."""
    groups = load_groups(config.data.dataset_config_file, config.data.data_root)
    active, exclusion_reasons = active_groups(groups, config.training.visual_gen, config.training.visual_und)
    for reason in exclusion_reasons:
        log.info("%s", reason)
    return active


def index_folder(config: Config) -> Path:
    """Return the folder of the run's index: ``--index_dir``, or a folder of the results."""
    return Path(config.data.index_dir) if config.data.index_dir is not None else Path(config.training.results_dir) / "index"


def ensure_index(config: Config, tokenizer: Tokenizer) -> Path:
    """Build the index below ``results_dir`` unless ``--index_dir`` is given, and return the index's folder.

    One process of the run calls this before the others open the index. A finished index of the same sources stays unchanged.

    Raises:
        ValueError: If it is of other sources, because a run must not change its data unnoticed, or if ``--index_dir`` holds no index:
            data_tools/build_index.py builds a large index, a training run does not.
    """
    folder = index_folder(config)
    if config.data.index_dir is None:
        log.info("no --index_dir given: the index of %s is in %s", config.data.dataset_config_file, folder)
        groups = load_groups(config.data.dataset_config_file, config.data.data_root)
        try:
            build_index(groups, Path(tokenizer.path), folder, BuildOptions(workers=config.data.num_workers))
        except ValueError as error:
            raise ValueError(f"the index of {config.data.dataset_config_file} could not be built in {folder}: {error}") from error
    elif not (folder / MANIFEST).is_file():
        raise ValueError(
            f"--index_dir {folder} holds no index; build one with data_tools/build_index.py, "
            f"or drop the flag to have {config.training.results_dir}/index built at the start"
        )
    return folder


def training_sources(config: Config, arch: BagelArch, tokenizer: Tokenizer, part: Part = "train") -> list[GroupSource]:
    """Open the groups over the rows that ``--split`` assigns to training or to validation. Validation drops no conditions.

    Raises ValueError as ``open_loader`` does, and for "validation" if nothing is held out.
    """
    model, training, train_val_split = config.model, config.training, TrainValSplit.parse(config.data.split, part)
    if part == "validation" and not train_val_split.block:
        raise ValueError('no rows are held out for validation: give --split, such as "99,1"')
    dropout = ConditionDropout(model.text_cond_dropout_prob, model.vae_cond_dropout_prob, model.vit_cond_dropout_prob)
    settings = PlanSettings(
        seed=training.global_seed,
        layout=layout_spec(arch, tokenizer),
        dropout=dropout if part == "train" else ConditionDropout(0.0, 0.0, 0.0),
        visual_und=training.visual_und,
        costs=CostModel.of(arch),
    )
    index, groups = IndexedSamples.open(index_folder(config), tokenizer), training_groups(config)
    cache = config.data.latent_cache
    latents = LatentCache(cache, index.manifest, groups) if cache is not None and training.visual_gen else None
    return open_sources(groups, index, settings, train_val_split, latents)


def stored_posterior(config: Config, arch: BagelArch) -> AutoencoderArch | None:
    """Return the autoencoder of ``--latent_cache``, whose posteriors the sources return instead of pixels, or None."""
    return arch.autoencoder if config.data.latent_cache is not None else None


def open_loader(
    config: Config, arch: BagelArch, tokenizer: Tokenizer, global_batch: int | BatchSizes, replica: int = 0, replicas: int = 1,
    share: EncodingShare | None = None,
) -> PackLoader:  # fmt: skip
    """Open the loader of one data-parallel replica, at the first pack.

    Args:
        config: The configuration.
        arch: The model.
        tokenizer: The tokenizer.
        global_batch: The packs of a global batch, or how they grow.
        replica: The number of this replica.
        replicas: The number of replicas.
        share: This rank's share of the encoding; only its images are read (default: all).

    Raises:
        ValueError: For any problem of the data configuration that shows without decoding an image: unknown groups, images too large for
            the model, an index that is missing or has another tokenizer, no sample at all.
    """
    data, training = config.data, config.training
    sizes = global_batch if isinstance(global_batch, BatchSizes) else BatchSizes.of(global_batch, [])
    sources = training_sources(config, arch, tokenizer)
    plan = PlannerConfig(
        max_num_tokens=data.max_num_tokens,
        expected_num_tokens=training.expected_num_tokens,
        max_num_tokens_per_sample=data.max_num_tokens_per_sample,
        window=data.max_buffer_size,
        seed=data.data_seed,
        global_batch_size=sizes.final,
    )
    posterior = stored_posterior(config, arch)
    reader = PackReader(sources, layout_spec(arch, tokenizer), training.global_seed, posterior, share, data.decode_threads)
    return PackLoader(Planner(sources, plan), reader, replica, replicas, data.num_workers, data.prefetch_factor, sizes)
