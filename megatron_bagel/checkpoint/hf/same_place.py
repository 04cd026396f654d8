# SPDX-License-Identifier: Apache-2.0
"""Start values with which a generation expert looks, from its first step, at the same place of the other pictures that it is shown.

An edit copies most of its source, and a decoder of usual start values takes thousands of edits to find out where to look: a noisy latent
is most like itself. Here the hidden space has three parts. The adapter writes latents into the first half. In the first layer, queries
and keys of half of the key/value groups are alike and read the third quarter, where only position and timestep lie. Their values read
latents, and the output projection writes them into the last quarter, so that what was found stays apart from the latent that found it.
Nothing here is learnt, and training may change all of it. A model asks for it with ``"generation_start": "same_place"`` in the decoder's
``config.json``; docs/small_world.md has what it changed.
"""

from __future__ import annotations

import hashlib
import math

import torch

from megatron_bagel.checkpoint.hf.weight_map import Entry
from megatron_bagel.config.architecture import BagelArch

_ATTENTION = "decoder.layers.0.self_attention.gen."
#: Rotary channels that turn further than this, in radians per position, hardly serve to compare pictures some positions apart.
_FAST_TURN = 0.02
#: What is left of those channels: not 0, from which queries and keys that are both small would hardly grow.
_FAST_SCALE = 0.1
#: Start value of the QK-norms, whose product sharpens attention.
_NORM = 1.5


def same_place_value(entry: Entry, arch: BagelArch, seed: int, usual: torch.Tensor) -> torch.Tensor:
    """Return the start value of ``entry``, whose usual one is ``usual``: a function of (seed, name), as that is.

    Raises:
        ValueError: If the layer has no attention of its own for generation, or the hidden size is too small for its parts.
    """
    if not arch.llm.has_gen_attention:
        raise ValueError(
            f"generation_start same_place starts an attention that {arch.llm.layer_module} does not have; use Qwen2MoTDecoderLayer, or "
            'leave "generation_start" out of the decoder\'s config.json'
        )
    if entry.name == "vae2llm.weight":
        latents = _parts(arch, seed, entry.shape[1])[0]
        return math.sqrt(2) * latents @ (latents.T @ usual)  # as large as the usual value
    if not entry.name.startswith(_ATTENTION) or not entry.name.endswith(".weight"):
        return usual
    if "layernorm" in entry.name:
        return torch.full_like(usual, _NORM)
    return (_queries_keys_values if "linear_qkv" in entry.name else _output)(entry, arch, seed, usual)


def _queries_keys_values(entry: Entry, arch: BagelArch, seed: int, usual: torch.Tensor) -> torch.Tensor:
    latents, places, _ = _parts(arch, seed)
    queries, keys, values = entry.unfuse(usual)
    width, heads, size = arch.llm.head_dim, _heads(arch), _row_size(arch)
    for group in range(_groups(arch)):
        rows = slice(group * width, (group + 1) * width)
        keys[rows] = size * _channel_scales(arch)[:, None] * (_orthonormal(places.shape[1], width, seed, f"place/{group}").T @ places.T)
        queries[heads * rows.start : heads * rows.stop] = keys[rows].repeat(heads, 1)
        values[rows] = size * _orthonormal(latents.shape[1], width, seed, f"value/{group}").T @ latents.T
    return entry.fuse([queries, keys, values])


def _output(entry: Entry, arch: BagelArch, seed: int, usual: torch.Tensor) -> torch.Tensor:
    copies = _parts(arch, seed)[2]
    width, heads, size = arch.llm.head_dim, _heads(arch), _row_size(arch)
    columns = usual.clone()
    for group in range(_groups(arch)):
        back = copies @ _orthonormal(copies.shape[1], width, seed, f"copy/{group}") / (size * heads)  # values are ``size`` times as large
        columns[:, group * heads * width : (group + 1) * heads * width] = back.repeat(1, heads)
    return columns


def _heads(arch: BagelArch) -> int:
    return arch.llm.num_attention_heads // arch.llm.num_key_value_heads


def _groups(arch: BagelArch) -> int:
    return max(1, arch.llm.num_key_value_heads // 2)


def _row_size(arch: BagelArch) -> float:
    """Return the length of a row of the usual value."""
    return arch.llm.initializer_range * math.sqrt(arch.llm.hidden_size)


def _channel_scales(arch: BagelArch) -> torch.Tensor:
    pairs = arch.llm.head_dim // 2
    turns = arch.llm.rope_theta ** (-torch.arange(pairs) / pairs)
    return torch.where(turns > _FAST_TURN, _FAST_SCALE, 1.0).repeat(2)


def _parts(arch: BagelArch, seed: int, latent_width: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return orthonormal bases, [hidden, width] each, of the parts for latents, for places and for copies."""
    hidden = arch.llm.hidden_size
    if latent_width > hidden // 2 or arch.llm.head_dim > hidden // 4:
        raise ValueError(
            f"generation_start same_place puts latents into half of a hidden size of {hidden} and heads of {arch.llm.head_dim} channels "
            f"into a quarter of it{f'; latents have {latent_width} channels' if latent_width > 1 else ''}. Use a larger hidden_size, or "
            'leave "generation_start" out of the decoder\'s config.json'
        )
    basis = _orthonormal(hidden, hidden, seed, "parts")
    return basis[:, : hidden // 2], basis[:, hidden // 2 : hidden - hidden // 4], basis[:, hidden - hidden // 4 :]


def _orthonormal(rows: int, columns: int, seed: int, name: str) -> torch.Tensor:
    digest = hashlib.sha256(f"{seed}/same_place/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
