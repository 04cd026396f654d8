# SPDX-License-Identifier: Apache-2.0
"""A batch of samples being measured, and its table of slots [samples, slots]: slot j is the j-th item of each sample's plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_bagel.data.index.columns import PlanningColumns, Ragged
from megatron_bagel.data.keyed_random import keyed_integers, keyed_uniform
from megatron_bagel.data.planner.sample_plan import PlanSettings, shares_max_pixels, transform_of
from megatron_bagel.data.sources.dataset_config import GroupConfig
from megatron_bagel.data.sources.stored_items import BY_FLAG
from megatron_bagel.data.transforms import output_sizes

ABSENT, TEXT_SLOT, VIT_SLOT, CLEAN_SLOT, NOISED_SLOT, NOISED_FRAME = range(6)  # kinds of slots; later items see noised frames of a clip


@dataclass(frozen=True)
class Batch:
    """The rows being measured: row numbers in their shard (or in concatenated columns), and the key of their draws."""

    shard: PlanningColumns
    rows: np.ndarray
    dataset: str
    indexes: np.ndarray
    epoch: int
    group: GroupConfig
    settings: PlanSettings

    def integers(self, high: np.ndarray, choice_name: str) -> np.ndarray:
        """Return a keyed draw in [0, high) per row."""
        return keyed_integers(high, self.settings.seed, self.dataset, self.indexes, self.epoch, choice_name)

    def is_below(self, probability: float | np.ndarray, choice_name: str) -> np.ndarray:
        """Return per row whether a keyed draw is below its probability."""
        return np.less(keyed_uniform(self.settings.seed, self.dataset, self.indexes, self.epoch, choice_name), probability)

    def selected(self, selection: np.ndarray) -> Batch:
        """Return the rows of a boolean or integer selection."""
        return Batch(self.shard, self.rows[selection], self.dataset, self.indexes[selection], self.epoch, self.group, self.settings)

    def starts(self, column: Ragged) -> np.ndarray:
        """Return where the values of each row begin in a column."""
        return column.offsets[self.rows].astype(np.int64)

    def counts(self, column: Ragged) -> np.ndarray:
        """Return how many values each row has in a column."""
        return column.offsets[self.rows + 1].astype(np.int64) - self.starts(column)

    def image_tokens(self, kind: str, images: np.ndarray, image_counts: np.ndarray | int = 1) -> np.ndarray:
        """Return the tokens, without border tokens, of images given by their index in the shard's image columns.

        ``image_counts`` are the images of their samples, which count where these share ``max_pixels``.
        """
        width, height = output_sizes(
            transform_of(self.group, kind), self.shard.width.values[images], self.shard.height.values[images],
            image_counts if shares_max_pixels(self.group, kind) else 1,
        )  # fmt: skip
        stride = self.settings.layout.vit_patch if kind == "vit" else self.settings.layout.vae_downsample
        return (width // stride) * (height // stride)


class Slots:
    """The table under construction; lengths exclude border tokens.

    ``drop`` holds the codes of stored_items.py, by the flag of the slot's kind unless a group says otherwise. ``continues`` marks frames
    of a clip that are in the split of the slot before; None if there are none.
    """

    def __init__(self, samples: int, slots: int) -> None:
        self.kind = np.zeros((samples, slots), dtype=np.int8)
        self.length = np.zeros((samples, slots), dtype=np.int64)
        self.drop: np.ndarray | int = BY_FLAG
        self.continues: np.ndarray | None = None

    def set_slot(self, slot: int, kind: int, length: np.ndarray, selection: np.ndarray | None = None) -> None:
        """Fill one slot of all samples, or of a boolean ``selection``."""
        mask = np.ones(len(self.kind), dtype=bool) if selection is None else selection
        self.kind[mask, slot] = kind
        self.length[mask, slot] = length[mask]
