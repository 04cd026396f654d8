# SPDX-License-Identifier: Apache-2.0
"""An item of a sample before its ids and sizes are known: the one form into which every group's rows are planned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from megatron_bagel.data.keyed_random import extended_word, keyed_word, uniform_of


class Draws(Protocol):
    """A source of a sample's choices, each with a name."""

    def choice(self, count: int, choice_name: str) -> int:
        """Return a number in [0, count)."""
        ...

    def chance(self, probability: float, choice_name: str) -> bool:
        """Return True with ``probability``."""
        ...


@dataclass(frozen=True)
class KeyedDraws:
    """The draws of training: keyed by sample and epoch, the same on every rank and worker."""

    seed: int
    dataset: str
    index: int
    epoch: int

    def choice(self, count: int, choice_name: str) -> int:
        """Return a number in [0, count), named by ``choice_name``. Raises ValueError if ``count`` is not positive."""
        if count <= 0:
            raise ValueError(f"cannot choose one of {count} things ({choice_name} of {self}): at least one is needed")
        return int(uniform_of(extended_word(self._word, choice_name)) * count)

    def chance(self, probability: float, choice_name: str) -> bool:
        """Return True with ``probability``; the draw is named by ``choice_name``."""
        return uniform_of(extended_word(self._word, choice_name)) < probability

    @cached_property
    def _word(self) -> int:
        """The bits of the key that all draws share, which take longer than the rest."""
        return keyed_word(self.seed, self.dataset, self.index, self.epoch)


@dataclass(frozen=True)
class ConditionDropout:
    """Probability that a condition of a kind is left out, drawn separately for every condition.

    ``own`` False also keeps conditions of interleaved samples that have a probability of their own.
    """

    text: float = 0.1
    vae: float = 0.3
    vit: float = 0.3
    own: bool = True

    def __post_init__(self) -> None:
        for kind in ("text", "vae", "vit"):
            if not 0.0 <= getattr(self, kind) <= 1.0:
                raise ValueError(f"--{kind}_cond_dropout_prob must be between 0 and 1, got {getattr(self, kind)}")

    def probability(self, kind: str, own: float | None) -> float:
        """Return the probability for a condition of ``kind`` that may have a probability of its ``own``."""
        if own is None:
            flag_probability: float = getattr(self, kind)
            return flag_probability
        return own if self.own else 0.0


@dataclass(frozen=True)
class PlannedItem:
    """One item of a plan.

    Attributes:
        kind: "text", "vit" or "vae".
        loss: Whether the text is learned, or the image drawn.
        droppable: Whether dropout may remove it.
        dropped: Whether dropout has removed it.
        texts: Indexes of the record's texts, joined in order.
        image: Index of the record's image.
        drop_probability: Probability of its own; None is that of its kind's flag.
        next_token: 0, or 1 + the position in ``stored_items.NEXT_TOKENS`` of the token to predict at its end.
        split_start: Whether it opens a split. Frames of a clip share one.
        split_end: Whether it closes a split.
        frame_delta: RoPE positions to the next frame of a clip.
    """

    kind: str
    loss: bool = False
    droppable: bool = False
    dropped: bool = False
    texts: tuple[int, ...] = ()
    image: int = -1
    drop_probability: float | None = None
    next_token: int = 0
    split_start: bool = True
    split_end: bool = True
    frame_delta: int | None = None
