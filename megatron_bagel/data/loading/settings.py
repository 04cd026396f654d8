# SPDX-License-Identifier: Apache-2.0
"""What a run's data are: which files, which part of them, how samples become packs, and how many processes read them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_bagel.data.index.index_cache import IndexCache
from megatron_bagel.data.planner.planner import PlannerConfig
from megatron_bagel.data.planner.sample_plan import ConditionDropout


@dataclass(frozen=True)
class ReaderSettings:
    """How samples are read, which has no influence on results: processes per rank, packs each of them prepares ahead, and its threads."""

    num_workers: int = 4
    prefetch_factor: int = 2
    decode_threads: int = 2


@dataclass(frozen=True)
class DataSettings:
    """Settings of ``open_loader`` and what it is made of.

    Attributes:
        dataset_config_file: YAML of dataset groups.
        data_root: folder of the raw data, for datasets without paths of their own.
        given_index: a finished index; None makes ``own_index`` at the start of the run.
        own_index: where an index of the run itself is.
        split: weights of training and validation rows; None trains on all.
        latent_cache: folder of stored posteriors; None encodes images.
        visual_gen: whether groups that generate images take part.
        visual_und: whether groups that need the vision tower take part.
        seed: seed of noise, timesteps and condition dropout.
        dropout: how often conditions are left out.
        packs: how samples become packs; the loader sets its global batch.
        reader: how samples are read.
        check_data: whether checksums of images and latents are compared when they are read: "small" ones, or all ("full").
        index_cache: what fetches the files of a given index in an object store; ``given_index`` is then its folder.
    """

    dataset_config_file: str
    data_root: str | None
    given_index: Path | None
    own_index: Path
    split: str | None
    latent_cache: str | None
    visual_gen: bool
    visual_und: bool
    seed: int
    dropout: ConditionDropout = field(default_factory=ConditionDropout)
    packs: PlannerConfig = field(default_factory=PlannerConfig)
    reader: ReaderSettings = field(default_factory=ReaderSettings)
    check_data: str = "small"
    index_cache: IndexCache | None = None

    @property
    def index(self) -> Path:
        """Where the run's index is, or will be made."""
        return self.given_index if self.given_index is not None else self.own_index
