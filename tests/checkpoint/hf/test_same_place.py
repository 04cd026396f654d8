# SPDX-License-Identifier: Apache-2.0
"""A generation expert that starts with ``same_place`` attends to the same place of another picture, and copies the latent that it finds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import rms_norm

from megatron_bagel.checkpoint.hf.initial_weights import initial_value, usual_value
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch
from megatron_bagel.model.positions import sincos_2d

SEED = 3
HIDDEN, HEAD = 128, 32
PLACES = 9
#: Rotary positions between the given picture and the one to draw: an instruction's length.
DISTANCE = 10


def arch_with(start: str, layer: str = "Qwen2MoTDecoderLayer", hidden: int = HIDDEN) -> BagelArch:
    config = {"hidden_size": hidden, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "vocab_size": 64, "initializer_range": 0.031, "qk_norm": True, "generation_start": start}  # fmt: skip
    return BagelArch(LLMArch.from_hf(config, layer_module=layer), None, AutoencoderArch(ch=32), max_latent_size=64)


def hidden_states(arch: BagelArch, latents: torch.Tensor) -> torch.Tensor:
    """Return what enters the first layer for a picture of 3 x 3 latents, normalised as the layer does it."""
    table = sincos_2d(HIDDEN, 64).reshape(64, 64, HIDDEN)
    places = torch.stack([table[row * 64 // 3, column * 64 // 3] for row in range(3) for column in range(3)])
    adapter = initial_value(WeightMap(arch).entries["vae2llm.weight"], arch, SEED)
    return rms_norm(latents @ adapter.T + places, (HIDDEN,))


def rotated(channels: torch.Tensor, position: int) -> torch.Tensor:
    angles = position * 1e6 ** (-torch.arange(HEAD // 2) / (HEAD // 2))
    first, second = channels.chunk(2, -1)
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def test_a_noisy_latent_attends_to_its_place_and_copies_what_lies_there() -> None:
    arch = arch_with("same_place")
    entries, layer = WeightMap(arch).entries, "decoder.layers.0.self_attention.gen."
    generator = torch.Generator().manual_seed(0)
    given, noise = torch.randn(2, PLACES, 64, generator=generator)
    states_given, states_noise = hidden_states(arch, given), hidden_states(arch, noise)
    query, key, value = entries[layer + "linear_qkv.weight"].unfuse(initial_value(entries[layer + "linear_qkv.weight"], arch, SEED))
    norm = initial_value(entries[layer + "q_layernorm.weight"], arch, SEED)
    for head in (0, 1):  # those of the first key/value group
        queries = rotated(rms_norm(states_noise @ query[head * HEAD : (head + 1) * HEAD].T, (HEAD,), norm), DISTANCE)
        keys = torch.cat([rotated(rms_norm(states @ key[:HEAD].T, (HEAD,), norm), at) for states, at in
                          ((states_given, 0), (states_noise, DISTANCE))])  # fmt: skip
        attention = (queries @ keys.T / math.sqrt(HEAD)).softmax(-1)
        to_given = attention[:, :PLACES]
        assert (to_given.argmax(-1) == torch.arange(PLACES)).all()
        assert to_given.diagonal().min() > 0.25, "nearly half of the attention, the other half being its own"
    projection = initial_value(entries[layer + "linear_proj.weight"], arch, SEED)[:, : 2 * HEAD]
    adapter = initial_value(entries["vae2llm.weight"], arch, SEED)
    assert (projection.T @ adapter).abs().max() < 1e-6, "a copy stays apart from latents, of others and of its own token"
    read, written = value[:HEAD], projection[:, :HEAD]
    # Singular values of the way from states to their copies: as large as what is copied, in all channels of a head.
    torch.testing.assert_close(torch.linalg.svdvals(written @ read)[:HEAD], torch.full((HEAD,), 0.5), msg="half by each of two heads")
    assert (read - read @ adapter @ torch.linalg.pinv(adapter)).abs().max() < 1e-5, "values read latents alone"


def test_only_the_generation_expert_and_its_adapter_change() -> None:
    usual, changed = arch_with("usual"), arch_with("same_place")
    differing = set()
    for name, entry in WeightMap(changed).entries.items():
        assert torch.equal(initial_value(entry, usual, SEED), usual_value(entry, usual, SEED)), name
        if not torch.equal(initial_value(entry, changed, SEED), initial_value(entry, usual, SEED)):
            differing.add(name)
    parts = ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")
    assert differing == {"vae2llm.weight", *(f"decoder.layers.0.self_attention.gen.{part}.weight" for part in parts)}


def test_a_model_that_cannot_start_so_is_refused() -> None:
    entry = WeightMap(arch_with("usual")).entries["vae2llm.weight"]
    with pytest.raises(ValueError, match="Qwen2MoEDecoderLayer does not have"):
        initial_value(entry, arch_with("same_place", layer="Qwen2MoEDecoderLayer"), SEED)
    with pytest.raises(ValueError, match="heads of 16 channels into a quarter of it; latents have 64"):
        initial_value(entry, arch_with("same_place", hidden=64), SEED)
    with pytest.raises(ValueError, match="'elsewhere' is not one of"):
        arch_with("elsewhere")
    assert replace(arch_with("same_place").llm, extra={}).generation_start == "usual"
