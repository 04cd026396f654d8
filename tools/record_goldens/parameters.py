# SPDX-License-Identifier: Apache-2.0
"""Which parameters and tokens a set keeps in full: a few of every kind, named for a decoder of any depth."""

from __future__ import annotations

from typing import Any

from tools.record_goldens.original import OriginalModel

_LAYER = "language_model.model.layers"


def kept_gradients(model: OriginalModel) -> list[str]:
    """Return the parameters whose gradients a set keeps, both experts and every module around the decoder among them."""
    last = len(model.language_model.model.layers) - 1
    one, two = min(1, last), min(2, last)
    vision = "vit_model.vision_model"
    return [
        f"{_LAYER}.0.self_attn.q_proj.weight", f"{_LAYER}.0.self_attn.q_norm.weight", f"{_LAYER}.{last}.self_attn.k_proj_moe_gen.weight",
        f"{_LAYER}.{last}.self_attn.k_norm_moe_gen.weight", f"{_LAYER}.{one}.self_attn.v_proj_moe_gen.bias",
        f"{_LAYER}.{two}.input_layernorm_moe_gen.weight", f"{_LAYER}.{two}.post_attention_layernorm.weight",
        "language_model.model.norm.weight", "language_model.model.norm_moe_gen.weight", f"{_LAYER}.{one}.self_attn.o_proj.weight",
        "llm2vae.weight", "llm2vae.bias", "vae2llm.weight", "time_embedder.mlp.0.bias", "time_embedder.mlp.2.bias",
        "connector.fc1.weight", "connector.fc2.bias", f"{vision}.encoder.layers.0.self_attn.out_proj.weight",
        f"{vision}.embeddings.patch_embedding.bias", f"{vision}.post_layernorm.weight",
    ]  # fmt: skip


def two_rank_gradients(model: OriginalModel) -> list[str]:
    """Return the parameters whose gradients over two ranks a set keeps."""
    return [*kept_gradients(model)[1:4], "llm2vae.weight", "connector.fc2.bias"]


def updated_parameters(model: OriginalModel) -> tuple[list[str], list[str]]:
    """Return the parameters, and the averages, that a set keeps after an update."""
    kept = kept_gradients(model)
    return [*kept[1:9], *kept[10:15], *kept[16:20]], [*kept[1:4], *kept[10:12]]


def hidden_positions(inputs: dict[str, Any], special: dict[str, int]) -> dict[str, int]:
    """Return the positions in a pack whose hidden states a set keeps: a few tokens of every kind."""
    text, vit, vae = inputs["packed_text_indexes"], inputs["packed_vit_token_indexes"], inputs["packed_vae_token_indexes"]
    clean = inputs["packed_timesteps"] == float("-inf")
    ids = inputs["packed_text_ids"]
    starts, ends = text[ids == special["start_of_image"]], text[ids == special["end_of_image"]]
    tokens = {
        "first_text": text[0], "text_mid": text[len(text) // 2], "text_ce": inputs["ce_loss_indexes"][0], "vit_first": vit[0],
        "vit_last": vit[-1], "vae_clean": vae[clean][0], "vae_noised_first": vae[~clean][0], "vae_noised_last": vae[~clean][-1],
        "start_of_image": starts[0], "end_of_image_last": ends[-1],
    }  # fmt: skip
    return {name: int(position) for name, position in tokens.items()}
