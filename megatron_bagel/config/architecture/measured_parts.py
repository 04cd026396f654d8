# SPDX-License-Identifier: Apache-2.0
"""Decoder and vision tower as their JSON describes them, with the sizes of the tensors where there are weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_bagel.config.architecture.llm import LLMArch
from megatron_bagel.config.architecture.stored_sizes import Shapes, corrected, decoder_sizes, vision_sizes
from megatron_bagel.config.architecture.vit import ViTArch

_RELEASED_LLM = {"layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True}


def decoder_of(shapes: Shapes, overrides: Mapping[str, Any], file: Path, config: dict[str, Any]) -> LLMArch:
    """Return the decoder of ``config``, the content of ``file``, with the sizes of the tensors where ``overrides`` do not win.

    A ``config.json`` is that of the pretrained decoder. Whether its head was tied says nothing of the trained one.
    """
    if file.name == "config.json":
        config = {**config, "tie_word_embeddings": None}
    sizes = {name: size for name, size in decoder_sizes(shapes).items() if overrides.get(name) is None}
    return LLMArch.from_hf({**_RELEASED_LLM, **corrected(config, sizes, file)}, **overrides)


def vision_tower_of(shapes: Shapes, config: dict[str, Any]) -> ViTArch:
    """Return the vision tower of a ``vit_config.json``, or of a SigLIP ``config.json``, with the sizes of the tensors."""
    vision_config = config.get("vision_config") or config
    return ViTArch.from_hf(corrected(vision_config, vision_sizes(shapes, vision_config), "the ViT's config"))
