# SPDX-License-Identifier: Apache-2.0
"""What generation asks of a decoder."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Decoder(Protocol):
    """The parts of ``BagelModel`` that generation calls."""

    def embed_text(self, ids: Tensor) -> Tensor:
        """Map token ids [n] to hidden states [n, h]."""

    def embed_times(self, t: Tensor) -> Tensor:
        """Map timesteps [n] to their embeddings [n, h]."""

    def embed_latents(self, x_t: Tensor, times: Tensor, latent_position_ids: Tensor) -> Tensor:
        """Map latent tokens [n, channels] to hidden states [n, h]; ``times`` [n, h], or [1, h] for all, comes from ``embed_times``."""

    def run_decoder(self, hidden: Tensor, n_und: int, position_ids: Tensor, attention: Any) -> Tensor:
        """Run all layers and the final norms on hidden states [n, h], those of the understanding expert first."""

    def all_text_logits(self, hidden: Tensor) -> Tensor:
        """Map hidden states [n, h] to logits of the whole vocabulary [n, V]."""

    def velocity(self, hidden: Tensor) -> Tensor:
        """Map hidden states [n, h] to velocities [n, channels]."""

    def parameters(self) -> Any:
        """Iterate over the weights, which tell device and dtype."""
