"""Which rows of a dataset are trained on and which are held out for validation: a keyed choice, without a list of rows.

Of every block of rows one is held out, at a keyed place. So the k-th row of either part is found by arithmetic and one draw, in a
data set of any size, and the choice depends on nothing but the dataset's name and the row's number: not on seeds, epochs,
``num_used_data`` or the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_bagel.data.keyed_random import keyed_integers

Part = Literal["train", "validation"]


@dataclass(frozen=True)
class Split:
    """Of every ``block`` rows one is held out (0: none); ``part`` is the side that is read."""

    block: int = 0
    part: Part = "train"

    @classmethod
    def parse(cls, text: str | None, part: Part = "train") -> Split:
        """From the flag ``--split``: the weights of training and validation, such as "99,1" (Megatron's spelling). None, or a
        validation weight of 0, holds nothing out; other shares are rounded to one row of a whole number of rows.

        Raises ValueError naming the flag.
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


EVERYTHING = Split()


@dataclass(frozen=True)
class SplitRows:
    """The rows of one part among the first ``stop`` of a dataset of ``total`` rows, in order; read like a ``range`` of them.

    A dataset smaller than a block is a block of its own, so that it too has a held-out row (where it has two rows).
    """

    dataset: str
    total: int
    stop: int
    split: Split

    def __len__(self) -> int:
        if not self._block:
            return 0 if self.split.part == "validation" else self.stop
        full, rest = divmod(self.stop, self._block)
        held_out = full + int(rest > 0 and self._held_out(np.array([full]))[0] < self.stop)
        return held_out if self.split.part == "validation" else self.stop - held_out

    def __getitem__(self, places: int | np.ndarray) -> np.ndarray:
        """Row numbers (int64) at ``places`` of this part. Raises IndexError beyond its end."""
        places = np.asarray(places, dtype=np.int64)
        if places.size and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"the {self.split.part} part of {self.dataset} has {len(self)} rows")
        if not self._block:
            return places
        if self.split.part == "validation":
            return self._held_out(places)
        block, offset = np.divmod(places, self._block - 1)
        rows = block * self._block + offset
        return rows + (rows >= self._held_out(block))

    def contains(self, rows: np.ndarray) -> np.ndarray:
        """Which of ``rows`` [n] of the dataset belong to the part, bool [n]."""
        held_out = rows == self._held_out(rows // self._block) if self._block else np.zeros(len(rows), dtype=bool)
        return (held_out if self.split.part == "validation" else ~held_out) & (rows < self.stop)

    @property
    def _block(self) -> int:
        block = min(self.split.block, self.total)
        return block if block > 1 else 0

    def _held_out(self, blocks: np.ndarray) -> np.ndarray:
        """The held-out row of each of ``blocks``; in the last block it may lie beyond the dataset's end, and is then none."""
        draw = keyed_integers(self._block, 0, self.dataset, "split", np.atleast_1d(blocks)).reshape(np.shape(blocks))
        return blocks * self._block + draw
