# SPDX-License-Identifier: Apache-2.0
"""The Gaussian noise of a generation, keyed by (seed, prompt, purpose), so that a batch equals its prompts one by one."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from megatron_bagel.data.keyed_random import keyed_generator, keyed_normal


class NoiseSource(Protocol):
    """The random draws that generation needs for one prompt."""

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """Return the starting point of the next picture, N(0, 1), [tokens, channels]."""
        ...

    def posterior(self, shape: tuple[int, ...]) -> Tensor:
        """Return noise for the autoencoder's posterior of the next input image, N(0, 1), [z, h, w]."""
        ...

    def text(self) -> np.random.Generator:
        """Return the generator for the next text's samples."""
        ...


class KeyedNoise:
    """Noise of one prompt as a function of the seed, the prompt's name and the number of earlier draws of the same kind."""

    def __init__(self, seed: int, prompt: int | str = 0) -> None:
        self.seed, self.prompt = seed, prompt
        self._counts = {"initial": 0, "posterior": 0, "text": 0}

    def _key(self, kind: str) -> tuple[int | str, ...]:
        count = self._counts[kind]
        self._counts[kind] += 1
        return "generate", self.prompt, kind, count

    def initial(self, shape: tuple[int, ...]) -> Tensor:
        """See ``NoiseSource.initial``."""
        return keyed_normal(shape, self.seed, *self._key("initial"))

    def posterior(self, shape: tuple[int, ...]) -> Tensor:
        """See ``NoiseSource.posterior``."""
        return keyed_normal(shape, self.seed, *self._key("posterior"))

    def text(self) -> np.random.Generator:
        """See ``NoiseSource.text``."""
        return keyed_generator(self.seed, *self._key("text"))
