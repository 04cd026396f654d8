# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model as its tensors show them. Where the JSON files of a folder disagree with a shape, the shape counts.

What follows from tensors that are present or absent (layers, QK-norm, a tied head) counts only where no file states it. A tensor that
a file promises and the folder lacks stays an error of the loader.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from megatron_bagel.common.notices import notice

Shapes = Mapping[str, tuple[int, ...]]
_EMBEDDING = "language_model.model.embed_tokens.weight"
_LAYERS = "language_model.model.layers."
_VISION = "vit_model.vision_model."


class Size(NamedTuple):
    """A setting that follows from tensors, and the words that say from which. A ``default`` counts only where no file states it."""

    value: Any
    evidence: str
    default: bool = False


def corrected(settings: Mapping[str, Any], sizes: Mapping[str, Size], source: object) -> dict[str, Any]:
    """Return ``settings`` with the sizes of the tensors; a notice tells each disagreement with ``source``, the file of the settings."""
    changes: dict[str, Any] = {}
    for name, size in sizes.items():
        stated = settings.get(name)
        if stated is not None and (size.default or stated == size.value or not _is_size(stated)):
            continue  # a value that is no size at all is refused where the setting is read
        changes[name] = size.value
        if stated is not None:
            notice(f"{source} says {name} {stated}, {size.evidence}: {size.value}")
    return {**settings, **changes}


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


def decoder_sizes(shapes: Shapes) -> dict[str, Size]:
    """Return the settings of ``llm_config.json`` that follow from the shapes of a folder's tensors."""
    sizes: dict[str, Size] = {}
    embedding = shapes.get(_EMBEDDING, ())
    if len(embedding) == 2:
        evidence = f"the token embedding has {embedding[0]:,} rows of {embedding[1]:,} values"
        sizes |= {"vocab_size": Size(embedding[0], evidence), "hidden_size": Size(embedding[1], evidence)}
        tied = "language_model.lm_head.weight" not in shapes
        sizes["tie_word_embeddings"] = Size(tied, f"there is {'no' if tied else 'an'} lm_head", default=True)
    if mlp := shapes.get(f"{_LAYERS}0.mlp.gate_proj.weight"):
        sizes["intermediate_size"] = Size(mlp[0], f"gate_proj has {mlp[0]:,} rows")
    if layers := _count(shapes, _LAYERS):
        sizes["num_hidden_layers"] = Size(layers, f"{layers} layers are stored", default=True)
    return sizes | _layer_sizes(shapes, f"{_LAYERS}0.")


def _layer_sizes(shapes: Shapes, layer: str) -> dict[str, Size]:
    query, key = shapes.get(f"{layer}self_attn.q_proj.weight"), shapes.get(f"{layer}self_attn.k_proj.weight")
    if not query or not key:
        return {}
    kind = "Qwen2DecoderLayer"
    if any(name.startswith(f"{layer}mlp_moe_gen.") for name in shapes):
        has_attention = f"{layer}self_attn.q_proj_moe_gen.weight" in shapes
        kind = "Qwen2MoTDecoderLayer" if has_attention else "Qwen2MoEDecoderLayer"
    norm = shapes.get(f"{layer}self_attn.q_norm.weight")
    sizes = {
        "layer_module": Size(kind, "the tensors of layer 0 are those of", default=True),
        "qk_norm": Size(norm is not None, "by the tensors of layer 0", default=True),
    }
    if norm:
        for name, rows in (("num_attention_heads", query[0]), ("num_key_value_heads", key[0])):
            sizes[name] = Size(rows // norm[0], f"its projection has {rows:,} rows and a head {norm[0]} values")
    return sizes


def vision_sizes(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Size]:
    """Return the settings of ``vit_config.json`` that follow from tensors; ``config`` is that file's content, for the patch size."""
    sizes: dict[str, Size] = {}
    patch = shapes.get(f"{_VISION}embeddings.patch_embedding.weight", ())
    if len(patch) == 2:
        sizes["hidden_size"] = Size(patch[0], f"the patch embedding has {patch[0]:,} rows")
    if mlp := shapes.get(f"{_VISION}encoder.layers.0.mlp.fc1.weight"):
        sizes["intermediate_size"] = Size(mlp[0], f"fc1 has {mlp[0]:,} rows")
    positions = shapes.get(f"{_VISION}embeddings.position_embedding.weight", ())
    patch_size, image_size = config.get("patch_size", 14), config.get("image_size", 224)
    side = _side(positions)
    if side and _is_size(patch_size) and _is_size(image_size) and image_size // patch_size != side:
        evidence = f"the position table has {positions[0]:,} rows for patches of {patch_size} pixels"
        sizes["image_size"] = Size(side * patch_size, evidence)
    return sizes


def top_sizes(shapes: Shapes, latent_channels: int) -> dict[str, Size]:
    """Return the settings of image generation that follow from tensors, for latents of ``latent_channels`` channels."""
    sizes: dict[str, Size] = {}
    table = shapes.get("latent_pos_embed.pos_embed", ())
    if side := _side(table):
        sizes["max_latent_size"] = Size(side, f"the table has {table[0]:,} rows")
    patch = shapes.get("vae2llm.weight", ())
    if len(patch) == 2:
        side = math.isqrt(patch[1] // latent_channels)
        if side and side**2 * latent_channels == patch[1]:
            sizes["latent_patch_size"] = Size(side, f"vae2llm has {patch[1]} columns", default=True)
    return sizes


def vision_grid(shapes: Shapes, layers: int) -> dict[str, Size]:
    """Return the settings of a vision tower of ``layers`` layers that follow from tensors: the position grid and the selected layer.

    A folder that stores all layers counts only used ones in its ``vit_config.json``.
    """
    sizes: dict[str, Size] = {}
    table = shapes.get(f"{_VISION}embeddings.position_embedding.weight", ())
    if side := _side(table):
        sizes["vit_max_num_patch_per_side"] = Size(side, f"the ViT's position table has {table[0]:,} rows")
    if layers == _count(shapes, f"{_VISION}encoder.layers."):
        sizes["vit_select_layer"] = Size(-1, f"all {layers} layers of the vision tower are stored", default=True)
    return sizes


def _side(table: tuple[int, ...]) -> int:
    """Return the side of a square position table, or 0."""
    side = math.isqrt(table[0]) if table else 0
    return side if table and side**2 == table[0] else 0


def _count(shapes: Shapes, prefix: str) -> int:
    """Return the number of layers under ``prefix``, which are numbered from 0."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(match[1]) for name in shapes if (match := pattern.match(name))}
    return max(numbers) + 1 if numbers else 0
