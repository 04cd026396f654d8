# SPDX-License-Identifier: Apache-2.0
"""Which rows of a dataset are for training and which are held out for validation: a keyed choice without a list of rows.

One row of every block is held out, at a keyed offset. Arithmetic and one draw then give the k-th row of either part, in a dataset of
any size. The choice depends only on the dataset's name and the row's number, not on seeds, epochs, ``num_used_data`` or the number of
ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_bagel.data.keyed_random import keyed_integers

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class TrainValSplit:
    """One of every ``block`` rows is held out (0: none); ``part`` is the part that is read."""

    block: int = 0
    part: Part = "train"

    @classmethod
    def parse(cls, text: str | None, part: Part = "train") -> TrainValSplit:
        """Parse the flag ``--split``: the weights of training and validation, such as "99,1" (Megatron's spelling).

        None, or a validation weight of 0, holds nothing out. Other shares are rounded to one row in a whole number of rows.

        Raises:
            ValueError: Naming the flag, if the text is not two valid weights.
        """
        if text is None:
            return cls(0, part)
        try:
            train, validation = (float(weight) for weight in text.split(","))
        except ValueError:
            train = validation = math.nan
        if not (0 <= validation <= train < math.inf and train > 0):
            raise ValueError(
                f'--split {text!r} must be two weights, of training and validation rows, such as "99,1"; validation gets half at most'
            )
        return cls(round((train + validation) / validation) if validation else 0, part)


ALL_ROWS = TrainValSplit()


@dataclass(frozen=True)
class TrainValRows:
    """The rows of one part among the first ``stop`` of a dataset of ``total`` rows, in order, indexed like a ``range``.

    A dataset smaller than a block is one block, so that it has a held-out row as well (if it has two rows).
    """

    dataset: str
    total: int
    stop: int
    train_val_split: TrainValSplit

    def __len__(self) -> int:
        if not self._block:
            return 0 if self.train_val_split.part == "validation" else self.stop
        num_blocks, remainder = divmod(self.stop, self._block)
        held_out = num_blocks + int(remainder > 0 and self._held_out(np.array([num_blocks]))[0] < self.stop)
        return held_out if self.train_val_split.part == "validation" else self.stop - held_out

    def __getitem__(self, positions: int | np.ndarray) -> np.ndarray:
        """Return the row numbers (int64) at ``positions`` of this part. Raises IndexError past its end."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError(f"the {self.train_val_split.part} part of {self.dataset} has {len(self)} rows")
        if not self._block:
            return positions
        if self.train_val_split.part == "validation":
            return self._held_out(positions)
        block, offset = np.divmod(positions, self._block - 1)
        rows = block * self._block + offset
        return rows + (rows >= self._held_out(block))

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Return which of ``rows`` [n] of the dataset belong to the part, bool [n]."""
        held_out = rows == self._held_out(rows // self._block) if self._block else np.zeros(len(rows), dtype=bool)
        return (held_out if self.train_val_split.part == "validation" else ~held_out) & (rows < self.stop)

    @property
    def _block(self) -> int:
        block = min(self.train_val_split.block, self.total)
        return block if block > 1 else 0

    def _held_out(self, blocks: np.ndarray) -> np.ndarray:
        """Return the held-out row of each of ``blocks``. In the last block it may be past the dataset's end, and then does not exist."""
        draws = keyed_integers(self._block, 0, self.dataset, "split", np.atleast_1d(blocks))
        return blocks * self._block + np.reshape(draws, np.shape(blocks))
