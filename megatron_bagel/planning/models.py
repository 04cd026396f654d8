# SPDX-License-Identifier: Apache-2.0
"""Named model sizes, so that a plan needs no folder: the shapes of the public checkpoints that BAGEL is built from."""

from __future__ import annotations

from math import prod
from pathlib import Path

from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch, SparseArch, ViTArch
from megatron_bagel.costs.flops import token_matrix_elements

#: SigLIP so400m in BAGEL's released folder: 980 pixels, without the last of 27 layers (``vit_select_layer``).
_SIGLIP = ViTArch(1152, 4304, 27, 16, image_size=980)
_MOT = "Qwen2MoTDecoderLayer"


def _bagel(llm: LLMArch, max_latent_size: int = 64) -> BagelArch:
    return BagelArch(llm, _SIGLIP, AutoencoderArch(), max_latent_size=max_latent_size)


MODELS: dict[str, BagelArch] = {
    # The released model.
    "bagel-7b-mot": _bagel(LLMArch(3584, 18944, 28, 28, 4, 152064, layer_module=_MOT)),
    # Other models that can start from Qwen2.5's public sizes.
    "qwen2.5-0.5b-mot": _bagel(LLMArch(896, 4864, 24, 14, 2, 151936, layer_module=_MOT)),
    "qwen2.5-1.5b-mot": _bagel(LLMArch(1536, 8960, 28, 12, 2, 151936, layer_module=_MOT)),
    "qwen2.5-3b-mot": _bagel(LLMArch(2048, 11008, 36, 16, 2, 151936, layer_module=_MOT)),
    "qwen2.5-14b-mot": _bagel(LLMArch(5120, 13824, 48, 40, 8, 152064, layer_module=_MOT)),
    "qwen2.5-32b-mot": _bagel(LLMArch(5120, 27648, 64, 40, 8, 152064, layer_module=_MOT)),
    "qwen2.5-72b-mot": _bagel(LLMArch(8192, 29568, 80, 64, 8, 152064, layer_module=_MOT)),
    # Qwen3-30B-A3B: 128 experts in each layer's MLP of either kind, of which 8 serve a token.
    "qwen3-30b-a3b-mot": _bagel(
        LLMArch(2048, 6144, 48, 32, 4, 151936, layer_module=_MOT, attention_bias=False, kv_channels=128, sparse=SparseArch(128, 8, 768))
    ),
}


def parameters(arch: BagelArch) -> int:
    """Return the count of a model's parameters without the autoencoder, and of the numbers of the two position tables."""
    weight_map = WeightMap(arch)
    tables = [table for table in weight_map.tables.values() if not table.rotary]
    return sum(prod(entry.shape) for entry in weight_map.entries.values()) + sum(prod(table.shape) for table in tables)


def active_parameters(arch: BagelArch, kind: str) -> int:
    """Return the matrix elements that serve a token of ``kind`` (``und`` or ``gen``) in the decoder, with its embedding and output layer.

    Of the experts of a sparse MLP only those that serve the token count. VAE tokens have neither embedding nor output layer.
    """
    vocabulary = arch.llm.vocab_size * arch.llm.hidden_size * (1 if arch.llm.tie_word_embeddings else 2)
    return token_matrix_elements(arch.llm, kind) + (vocabulary if kind == "und" else 0)


def model_named(name: str) -> BagelArch:
    """Return a named size, or the model of a folder in the released format. Raises ValueError for a name that is neither."""
    if name in MODELS:
        return MODELS[name]
    if not Path(name).is_dir():
        raise ValueError(f"--model {name} is neither a folder nor a named size; the names are {', '.join(MODELS)}")
    return BagelArch.from_hf_folder(name)
