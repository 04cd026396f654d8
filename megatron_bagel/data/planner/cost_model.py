# SPDX-License-Identifier: Apache-2.0
"""What the planner knows of a sample: three numbers per candidate, so that millions of them are planned as arrays.

A sample's final length is known before it is read, because condition dropout is a keyed draw.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch

COST_UNIT = 256  # costs are integers: 1/256 of the work of one token in the decoder's matrix products


@dataclass(frozen=True)
class CostModel:
    """Work of a pack relative to one token in the decoder's matrix products, forward and backward.

    The defaults are ratios of floating-point operations at the released size (Qwen2.5-7B, SigLIP so400m, FLUX): ``pair`` is one
    (query, key) pair of attention, 4 * heads * head_dim * layers against 2 * parameters of one expert; ``vit_token`` one token of
    the vision tower; ``vae_token`` the pixels of one latent token through the frozen encoder, which has no backward pass.
    """

    pair: float = 3.1e-5
    vit_token: float = 0.06
    vae_token: float = 0.024

    @classmethod
    def of(cls, arch: BagelArch) -> CostModel:
        """Return the ratios of a model by its floating-point operations (2 per multiply-add; backward twice the forward pass)."""
        llm, vit, autoencoder = arch.llm, arch.vit, arch.autoencoder
        queries, keys = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
        per_layer = llm.hidden_size * (2 * queries + 2 * keys) + 3 * llm.hidden_size * llm.intermediate_size
        token = 2 * llm.num_hidden_layers * per_layer
        pair = 4 * llm.num_hidden_layers * queries
        vit_token = 0
        if vit is not None:
            vit_token = 2 * arch.n_vit_layers * (4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.intermediate_size)
        pixels = arch.vae_token_pixels**2
        vae_token = _encoder_work_per_pixel(autoencoder) * pixels / 3 if autoencoder is not None else 0
        return cls(pair / token, vit_token / token, vae_token / token)


def _encoder_work_per_pixel(arch: AutoencoderArch) -> float:
    """Return the operations of the encoder's 3x3 convolutions per input pixel: two per residual block, a quarter area per level."""
    work, width = 18.0 * arch.in_channels * arch.ch, arch.ch
    for level, multiple in enumerate(arch.ch_mult):
        level_width = arch.ch * multiple
        work += 18.0 * (width * level_width + (2 * arch.num_res_blocks - 1) * level_width * level_width) / 4**level
        width = level_width
    return work + 4 * 18.0 * width * width / 4 ** (len(arch.ch_mult) - 1)


@dataclass(frozen=True)
class Measures:
    """Measures of samples, arrays [n] (int64).

    ``tokens`` is the length in the pack, with border tokens and without dropped items. ``full_tokens`` also counts dropped items; the
    limit per sample applies to it, so that dropout cannot decide which samples are ever trained on. ``cost`` is in units of
    1 / COST_UNIT decoder token.
    """

    tokens: np.ndarray
    full_tokens: np.ndarray
    cost: np.ndarray


class SampleSource(Protocol):
    """A group of the data configuration as the planner sees it. Indexes count from 0 to ``len(source)``.

    ``keep_position`` False restarts the source on resume. ``describe`` names a sample for a reader: dataset, file and row.
    """

    name: str
    weight: float
    is_mandatory: bool
    keep_position: bool

    def __len__(self) -> int: ...

    def measure(self, indexes: np.ndarray, epoch: int) -> Measures:
        """Return tokens and costs of the samples ``indexes`` [n] in ``epoch``."""

    def describe(self, index: int) -> str:
        """Name the sample and its place in the data, for messages."""
