# SPDX-License-Identifier: Apache-2.0
"""The flow velocity of pictures under their contexts, as a pass that a picture's steps repeat.

Everything that does not change between the steps is computed once: borders, positions, and which token belongs to which context. A
repeated pass then takes nothing from the host, and every time it issues the same operations on the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_bagel.inference.core.cached_attention import CachedAttention, NewTokens
from megatron_bagel.inference.core.context import Context
from megatron_bagel.inference.core.decoder import Decoder


class VelocityPass:
    """Predicts the velocity of a noised picture under each context; contexts are not extended."""

    def __init__(self, decoder: Decoder, contexts: Sequence[Context], borders: Tensor, sizes: Sequence[int]) -> None:
        """Prepare the pass.

        Args:
            decoder: The decoder.
            contexts: The contexts.
            borders: The embeddings [2, h] of the tokens before and after an image.
            sizes: The tokens of the picture under each context.
        """
        self._decoder = decoder
        self._borders = borders.repeat(len(contexts), 1)
        rows = [NewTokens(context, len(borders), size) for context, size in zip(contexts, sizes, strict=True)]
        self._attention = CachedAttention(rows, causal=False, keep=False)
        # All tokens of an image share one position; those of the understanding expert come first, as in ``CachedAttention``.
        tokens = [row.und for row in rows] + [row.gen for row in rows]
        positions = torch.tensor([row.context.position for row in rows] * 2).repeat_interleave(torch.tensor(tokens))
        self._position_ids = positions.to(borders.device)

    def __call__(self, embedded: Sequence[Tensor]) -> Tensor:
        """Return the velocities [tokens of all contexts, channels], float32.

        ``embedded`` has the picture [tokens, h] of each context; several contexts may share one.
        """
        n_und = len(self._borders)
        hidden = torch.cat([self._borders, *embedded])
        hidden = self._decoder.run_decoder(hidden, n_und, self._position_ids, self._attention)
        return self._decoder.velocity(hidden[n_und:]).float()
