# SPDX-License-Identifier: Apache-2.0
"""Two counts of floating-point operations under separate names: the original's MFU formula, and the work that a step really does.

``mfu_flops`` repeats the original's formula so that its published percentages can be compared. It counts one expert, the
embedding as if it were a matrix product, full-square attention, and neither ViT nor autoencoder. ``work_flops`` counts what
runs: the exact mask area, loss heads only for loss tokens, ViT, connector and autoencoder. Neither counts recomputed
activations. A multiply-add is two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, ViTArch
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.pack import Pack

# Dense bf16 peak in TFLOP/s by device name: the original's list, and B200 from NVIDIA's data sheet. The first name contained in the
# device's name applies, so longer names precede their prefixes.
PEAK_TFLOPS = {
    "MI300X": 1336.0,
    "H100": 989.0,
    "H800": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40": 181.05,
    "L20": 119.5,
    "H20": 148.0,
    "910B": 354.0,
    "RTX 3070 Ti": 21.75,
}


def peak_tflops(device_name: str, flag: float = 0.0) -> float:
    """Return a device's peak in TFLOP/s: ``flag`` (--peak_device_tflops) if positive, else by name, else 0 (MFU is then 0)."""
    if flag > 0:
        return flag
    return next((peak for name, peak in PEAK_TFLOPS.items() if name.lower() in device_name.lower()), 0.0)


@dataclass(frozen=True)
class StepWork:
    """The work of one or more packs in counts. They are additive, so the packs of a global batch can be summed."""

    tokens: int = 0
    sum_len_squared: int = 0
    mask_area: int = 0
    vae_tokens: int = 0
    ce_tokens: int = 0
    mse_tokens: int = 0
    vit_tokens: int = 0
    vit_sum_len_squared: int = 0
    vae_pixels: int = 0
    vae_pixels_squared: int = 0

    @classmethod
    def of(cls, pack: Pack) -> StepWork:
        """Return the counts of one pack (without padding)."""
        vit = np.array([image.tokens for image in pack.images if image.kind == "vit"], dtype=np.int64)
        pixels = np.array([image.height * image.width for image in pack.images if image.kind == "vae"], dtype=np.int64)
        return cls(
            tokens=int(pack.sequence_length),
            sum_len_squared=int((pack.sample_lens.astype(np.int64) ** 2).sum()),
            mask_area=int(PackMask.of(pack).row_areas().sum()),
            vae_tokens=len(pack.vae_positions),
            ce_tokens=len(pack.ce_positions),
            mse_tokens=len(pack.mse_positions),
            vit_tokens=int(vit.sum()),
            vit_sum_len_squared=int((vit**2).sum()),
            vae_pixels=int(pixels.sum()),
            vae_pixels_squared=int((pixels**2).sum()),
        )

    def __add__(self, other: StepWork) -> StepWork:
        return StepWork(*(a + b for a, b in zip(self.__dict__.values(), other.__dict__.values(), strict=True)))


def layer_matrix_elements(llm: LLMArch) -> int:
    """Return the matrix elements that one token meets in a decoder layer with dense MLPs; both experts have the same sizes."""
    head_dim = int(llm.extra.get("head_dim") or llm.head_dim)
    query, key_value = llm.num_attention_heads * head_dim, llm.num_key_value_heads * head_dim
    return 3 * llm.hidden_size * llm.intermediate_size + llm.hidden_size * 2 * (query + key_value)


def token_matrix_elements(llm: LLMArch, kind: str = "und", layers: Sequence[int] | None = None) -> int:
    """Return the matrix elements that a token of an expert kind meets in all layers: of sparse experts only those that serve it.

    Args:
        llm: The decoder.
        kind: ``und`` or ``gen``.
        layers: The layers to count, from 0; all if None.
    """
    numbers = range(llm.num_hidden_layers) if layers is None else layers
    dense = layer_matrix_elements(llm)
    if llm.sparse is None:
        return len(numbers) * dense
    sparse_layers = sum(llm.is_sparse(layer, kind) for layer in numbers)
    return len(numbers) * dense + sparse_layers * (sparse_mlp_elements(llm) - 3 * llm.hidden_size * llm.intermediate_size)


def decoder_multiplications(llm: LLMArch, work: StepWork, layers: Sequence[int] | None = None) -> int:
    """Return the multiplications of a forward pass in the matrices of some layers (all if None), over the tokens of ``work``."""
    und, gen = (token_matrix_elements(llm, kind, layers) for kind in ("und", "gen"))
    return und * (work.tokens - work.vae_tokens) + gen * work.vae_tokens


def mlp_multiplications(llm: LLMArch, work: StepWork) -> int:
    """Return the share of ``decoder_multiplications`` that is in MLPs, routers included."""
    attention = layer_matrix_elements(llm) - 3 * llm.hidden_size * llm.intermediate_size
    return decoder_multiplications(llm, work) - llm.num_hidden_layers * attention * work.tokens


def sparse_mlp_elements(llm: LLMArch) -> int:
    """Return the matrix elements that a token meets in a sparse MLP: router, its experts, and a shared expert."""
    if llm.sparse is None:
        return 0
    width = llm.sparse.num_experts_per_tok * llm.sparse.moe_intermediate_size + (llm.sparse.shared_expert_intermediate_size or 0)
    return llm.hidden_size * (3 * width + llm.sparse.num_experts)


def mfu_flops(llm: LLMArch, work: StepWork) -> float:
    """Return the original's count: 6 N tokens + 12 d H L sum(len^2), N = L (3 D I + D (q + k + v + q)) + 2 V D.

    With sparse experts N counts those that serve a text token.
    """
    head_dim = int(llm.extra.get("head_dim") or llm.head_dim)
    elements = token_matrix_elements(llm) + 2 * llm.vocab_size * llm.hidden_size
    attention = 12 * head_dim * llm.num_attention_heads * llm.num_hidden_layers
    return float(6 * elements * work.tokens + attention * work.sum_len_squared)


@dataclass(frozen=True)
class WorkFlops:
    """Operations of a step by part, forward and backward (the autoencoder only forward)."""

    decoder_linear: float
    decoder_attention: float
    heads: float
    vit: float
    autoencoder: float

    @property
    def total(self) -> float:
        """Return the sum of all parts."""
        return self.decoder_linear + self.decoder_attention + self.heads + self.vit + self.autoencoder


def work_flops(arch: BagelArch, work: StepWork, freeze_llm: bool = False, freeze_vit: bool = False) -> WorkFlops:
    """Return the operations of a step without recomputation.

    A matrix element costs, per token, 2 operations forward, 2 for the gradient of the input, and 2 for that of the weight if it
    trains. Attention has two products forward and four backward over the exact mask area: 12 d H per visible pair and layer.
    """
    llm, train = arch.llm, 4 if freeze_llm else 6
    width = arch.latent_patch_size**2 * (arch.autoencoder.z_channels if arch.autoencoder else 0)
    heads = train * llm.vocab_size * llm.hidden_size * work.ce_tokens
    # vae2llm and the first timestep layer read data, so they have no input gradient; llm2vae does.
    heads += llm.hidden_size * (6 * width * work.mse_tokens + work.vae_tokens * (4 * width + 4 * 256 + 6 * llm.hidden_size))
    linear = decoder_multiplications(llm, work)
    return WorkFlops(
        decoder_linear=float(train * linear),
        decoder_attention=float(12 * llm.hidden_size * llm.num_hidden_layers * work.mask_area),
        heads=float(heads),
        vit=_vit_flops(arch.vit, arch.n_vit_layers, llm.hidden_size, work, freeze_vit) if arch.vit else 0.0,
        autoencoder=autoencoder_encode_flops(arch.autoencoder, work) if arch.autoencoder else 0.0,
    )


def _vit_flops(vit: ViTArch, layers: int, llm_width: int, work: StepWork, frozen: bool) -> float:
    """Return the operations of ViT and connector. A frozen ViT runs only forward, while the connector always trains."""
    dim = vit.hidden_size
    layer = 4 * dim * dim + 2 * dim * vit.intermediate_size
    patch = vit.num_channels * vit.patch_size**2 * dim
    linear = (2 if frozen else 6) * layers * layer + (2 if frozen else 4) * patch
    attention = (4 if frozen else 12) * dim * layers * work.vit_sum_len_squared
    connector = (4 if frozen else 6) * dim * llm_width + 6 * llm_width * llm_width
    return float((linear + connector) * work.vit_tokens + attention)


def autoencoder_encode_flops(ae: AutoencoderArch, work: StepWork) -> float:
    """Return the operations of the encoder's forward pass: convolutions per pixel at each resolution, and the middle attention."""

    def res_block(inputs: int, outputs: int) -> int:
        return 9 * inputs * outputs + 9 * outputs * outputs + (inputs * outputs if inputs != outputs else 0)

    macs, area, channels = 9.0 * ae.in_channels * ae.ch, 1.0, ae.ch
    for level, multiplier in enumerate(ae.ch_mult):
        width = ae.ch * multiplier
        macs += area * (res_block(channels, width) + (ae.num_res_blocks - 1) * res_block(width, width))
        channels = width
        if level < len(ae.ch_mult) - 1:
            area /= 4.0
            macs += area * 9 * channels * channels
    macs += area * (2 * res_block(channels, channels) + 4 * channels * channels + 9 * channels * 2 * ae.z_channels)
    pairs = area * area * work.vae_pixels_squared
    return 2.0 * macs * work.vae_pixels + 4.0 * channels * pairs


def utilization(flops: float, seconds: float, peak_tflops_per_device: float, devices: int) -> tuple[float, float]:
    """Return TFLOP/s over all devices and the fraction of their peak, which is 0 if the peak is unknown (0)."""
    achieved = flops / seconds / 1e12 if seconds > 0 else 0.0
    peak = peak_tflops_per_device * devices
    return achieved, achieved / peak if peak > 0 else 0.0
