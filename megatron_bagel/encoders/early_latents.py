# SPDX-License-Identifier: Apache-2.0
"""Latents that are computed one step early, beside the decoder's work on the step before.

The autoencoder is frozen, so latents do not depend on the update between the two steps. Only a rank's own encoding is early. What ranks
exchange stays in its step, so the order of collectives is the same with and without early latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_bagel.data.loading.loaded_pack import LoadedPack
from megatron_bagel.platform.side_stream import SideStream


class EarlyLatents:
    """Holds the latents of the packs of one coming step, or nothing. They are given out once, and only for these very packs."""

    def __init__(self, device: torch.device | str) -> None:
        self._stream = SideStream(device)
        self._packs: list[LoadedPack] = []
        self._latents: Callable[[], list[torch.Tensor]] | None = None

    def start(self, packs: Sequence[LoadedPack], encode: Callable[[], list[torch.Tensor]]) -> None:
        """Queue ``encode``, which returns the latents of ``packs``, unless these packs are queued already.

        Packs with unreadable samples are left to their step, because their samples will be replaced.
        """
        if any(pack.failures for pack in packs) or self._holds(packs):
            return
        self._packs, self._latents = [], None  # frees what was never taken before more is computed
        self._latents = self._stream.queue(encode)
        self._packs = list(packs)

    def take(self, packs: Sequence[LoadedPack]) -> list[torch.Tensor] | None:
        """Return the latents of ``packs`` and forget them, or None if they were not encoded early.

        A step that is computed again therefore encodes again. Packs of which one was replaced are not the same packs: where ranks share
        the images, the replacement may have changed who encodes which. An evaluation between two steps takes nothing away.
        """
        if self._latents is None or not self._holds(packs):
            return None
        latents = self._latents()
        self._packs, self._latents = [], None
        return latents

    def _holds(self, packs: Sequence[LoadedPack]) -> bool:
        same = all(held is pack for held, pack in zip(self._packs, packs, strict=False))
        return self._latents is not None and len(self._packs) == len(packs) and same
