# SPDX-License-Identifier: Apache-2.0
"""Dropout whose draws are a function of the token, the linear and the channel, so that they do not depend on layouts or recomputation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GOLDEN, _MUL1, _MUL2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
#: Elements of a mask that are drawn at a time; each takes 8 bytes while it is drawn.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Draws:
    """The random words of tokens, int64 [n]; ``data/loading/noise.py`` keys them by the token's sample and its place there."""

    words: torch.Tensor

    def kept(self, key: int, first_channel: int, channels: int, share: float) -> torch.Tensor:
        """Return which inputs are kept, bool [n, channels]; each is dropped with probability ``share``.

        Args:
            key: A number for the linear.
            first_channel: The number of the first channel in the full linear.
            channels: The number of channels.
            share: The share that is dropped.
        """
        numbers = torch.arange(first_channel + 1, first_channel + channels + 1, device=self.words.device)
        channel_words = mixed(numbers * _signed(_GOLDEN) + _signed(key))
        threshold = int(share * 2.0**31)
        rows = max(_BLOCK // max(channels, 1), 1)
        blocks = [(_shifted(mixed(block[:, None] ^ channel_words), 33) >= threshold) for block in self.words.split(rows)]
        return torch.cat(blocks) if len(blocks) != 1 else blocks[0]


def mixed(words: torch.Tensor) -> torch.Tensor:
    """Apply the finaliser of splitmix64 to int64 words, as ``data/keyed_random.py`` does to unsigned ones."""
    words = (words ^ _shifted(words, 30)) * _signed(_MUL1)
    words = (words ^ _shifted(words, 27)) * _signed(_MUL2)
    return words ^ _shifted(words, 31)


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right as if the words were unsigned."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """Return a 64-bit word as a signed number."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >= 1 << 63 else word
