# SPDX-License-Identifier: Apache-2.0
"""Builds a run's loader from its settings: which groups take part, which index holds them, how samples become packs.

It knows ranks only as two numbers, this replica's place and how many there are.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch
from megatron_bagel.config.batch_size import BatchSizes
from megatron_bagel.data.index.build import BuildOptions, build_index
from megatron_bagel.data.index.format import MANIFEST, read_manifest
from megatron_bagel.data.index.latent_cache import LatentCache
from megatron_bagel.data.index.reader import IndexedSamples
from megatron_bagel.data.index.train_val_split import Part, TrainValSplit
from megatron_bagel.data.loading.encoder_assignment import EncodingShare
from megatron_bagel.data.loading.fingerprint import other_sources
from megatron_bagel.data.loading.loader import PackLoader
from megatron_bagel.data.loading.pack_reader import PackReader
from megatron_bagel.data.loading.settings import DataSettings
from megatron_bagel.data.planner.cost_model import CostModel
from megatron_bagel.data.planner.group_source import GroupSource, PlanSettings, open_sources
from megatron_bagel.data.planner.planner import Planner
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


def training_groups(settings: DataSettings) -> list[GroupConfig]:
    """The dataset groups this run trains on; says in the log which ones ``visual_gen`` and ``visual_und`` leave out."""
    groups = load_groups(settings.dataset_config_file, settings.data_root)
    active, left_out = active_groups(groups, settings.visual_gen, settings.visual_und)
    for reason in left_out:
        log.info("%s", reason)
    return active


def ensure_index(settings: DataSettings, tokenizer: Tokenizer) -> Path:
    """Make the index below ``results_dir`` where no ``--index_dir`` is given, and return the index's folder.

    One process of the run calls this before the others open the index. A finished index of the same sources stays unchanged.

    Raises:
        ValueError: If it is of other sources, because a run must not change its data unnoticed, or if ``--index_dir`` holds no index:
            data_tools/build_index.py builds a large index, a training run does not.
    """
    folder = settings.index
    if settings.index_cache is not None:
        settings.index_cache.fetch_manifest()
    if settings.given_index is None:
        log.info("no --index_dir given: the index of %s is kept in %s", settings.dataset_config_file, folder)
        groups = load_groups(settings.dataset_config_file, settings.data_root)
        try:
            remedy = "remove this folder to have it built again, or give another --results_dir or a finished index as --index_dir"
            options = BuildOptions(workers=settings.reader.num_workers, workers_flag="--num_workers")
            build_index(groups, Path(tokenizer.path), folder, options, remedy)
        except ValueError as error:
            raise ValueError(f"the index of {settings.dataset_config_file} could not be made in {folder}: {error}") from error
    elif not (folder / MANIFEST).is_file():
        raise ValueError(
            f"--index_dir {folder} holds no index; build one with data_tools/build_index.py, "
            f"or leave the flag out to have {settings.own_index} made at the start"
        )
    else:
        for sentence in other_sources(read_manifest(folder), load_groups(settings.dataset_config_file, settings.data_root)):
            log.warning("%s", sentence)
    return folder


def training_sources(settings: DataSettings, arch: BagelArch, tokenizer: Tokenizer, part: Part = "train") -> list[GroupSource]:
    """The groups over the rows that ``--split`` gives to training or to validation; held-out samples keep all their conditions.

    Raises ValueError as ``open_loader`` does, and for "validation" if nothing is held out.
    """
    train_val_split = TrainValSplit.parse(settings.split, part)
    if part == "validation" and not train_val_split.block:
        raise ValueError('no rows are held out for validation: give --split, such as "99,1"')
    plan_settings = PlanSettings(
        seed=settings.seed,
        layout=layout_spec(arch, tokenizer),
        dropout=settings.dropout if part == "train" else ConditionDropout(0.0, 0.0, 0.0, own=False),
        visual_und=settings.visual_und,
        costs=CostModel.of(arch),
    )
    check_all = settings.check_data == "full"
    index, groups = IndexedSamples.open(settings.index, tokenizer, check_all, settings.index_cache), training_groups(settings)
    cache = settings.latent_cache
    latents = LatentCache(cache, index.manifest, groups, check_all) if cache is not None and settings.visual_gen else None
    return open_sources(groups, index, plan_settings, train_val_split, latents)


def stored_posterior(settings: DataSettings, arch: BagelArch) -> AutoencoderArch | None:
    """The autoencoder whose posteriors the sources hand out in place of pixels: that of ``--latent_cache``, or None."""
    return arch.autoencoder if settings.latent_cache is not None else None


def open_loader(
    settings: DataSettings, arch: BagelArch, tokenizer: Tokenizer, global_batch: int | BatchSizes, replica: int = 0, replicas: int = 1,
    share: EncodingShare | None = None,
) -> PackLoader:  # fmt: skip
    """Open the loader of one data-parallel replica, at the first pack.

    Args:
        settings: The settings of the data.
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
    sizes = global_batch if isinstance(global_batch, BatchSizes) else BatchSizes.of(global_batch, [])
    sources, reading = training_sources(settings, arch, tokenizer), settings.reader
    posterior = stored_posterior(settings, arch)
    reader = PackReader(sources, layout_spec(arch, tokenizer), settings.seed, posterior, share, reading.decode_threads)
    mix = {source.name: rule for source in sources if (rule := source.rule) is not None}
    planner = Planner(sources, replace(settings.packs, global_batch_size=sizes.final, mix=mix))
    return PackLoader(planner, reader, replica, replicas, reading.num_workers, reading.prefetch_factor, sizes)
