# SPDX-License-Identifier: Apache-2.0
"""The settings of a run's data from flags. This module imports nothing of the model."""

from __future__ import annotations

from pathlib import Path

from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import own_index
from megatron_bagel.data.index.index_cache import IndexCache
from megatron_bagel.data.loading.settings import DataSettings, ReaderSettings
from megatron_bagel.data.planner.planner import PlannerConfig
from megatron_bagel.data.planner.sample_plan import ConditionDropout


def data_settings(config: Config) -> DataSettings:
    """Return the settings of files, packs and reading processes."""
    model, data, training = config.model, config.data, config.training
    cache = _index_cache(config)
    given_index = Path(data.index_dir) if data.index_dir is not None else None
    return DataSettings(
        dataset_config_file=data.dataset_config_file,
        data_root=data.data_root,
        given_index=given_index if cache is None else cache.folder,
        own_index=own_index(config),
        split=data.split,
        latent_cache=data.latent_cache,
        visual_gen=training.visual_gen,
        visual_und=training.visual_und,
        seed=training.global_seed,
        dropout=ConditionDropout(model.text_cond_dropout_prob, model.vae_cond_dropout_prob, model.vit_cond_dropout_prob),
        packs=PlannerConfig(
            max_num_tokens=data.max_num_tokens,
            expected_num_tokens=training.expected_num_tokens,
            max_num_tokens_per_sample=data.max_num_tokens_per_sample,
            window=data.max_buffer_size,
            seed=data.data_seed,
        ),
        reader=ReaderSettings(data.num_workers, data.prefetch_factor, data.decode_threads),
        check_data=data.check_data,
        index_cache=cache,
    )


def _index_cache(config: Config) -> IndexCache | None:
    """Return what fetches an index in an object store, or None for one on this machine."""
    data = config.data
    if data.index_dir is None or "://" not in data.index_dir or data.index_cache_dir is None:
        return None
    return IndexCache(data.index_dir, Path(data.index_cache_dir), data.index_cache_bytes)
