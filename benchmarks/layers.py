# SPDX-License-Identifier: Apache-2.0
"""The expert-sorted layer against the plain gather/scatter layer, same weights, same tokens, forward and backward."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from benchmarks.gather_scatter_layer import GatherScatterLayer
from benchmarks.measure import OperatorCalls, alternating_seconds, count_operators
from benchmarks.named_configs import megatron_config
from megatron_bagel import platform
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, LLMArch
from megatron_bagel.layout.mask import PackMask
from megatron_bagel.layout.order import TokenOrder, expert_order
from megatron_bagel.layout.pack import Pack
from megatron_bagel.model.batch import attention_plan
from megatron_bagel.model.build import build_decoder
from megatron_bagel.model.rope import rotary_table


def half_generation_pack(tokens: int, samples: int = 8) -> Pack:
    """Samples of equal length, each a text and a noised image of the same number of tokens; only routing and mask matter."""
    each = tokens // samples
    text, image = each // 2 - 1, each - each // 2 - 1
    starts = np.arange(samples) * each
    inside = np.concatenate([np.arange(text + 1), [each - 1]])  # text, and the two border tokens of the image
    empty, pairs = np.zeros(0, dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
    text_positions = (starts[:, None] + inside).reshape(-1)
    vae_positions = (starts[:, None] + text + 1 + np.arange(image)).reshape(-1)
    position_ids = np.tile(np.minimum(np.arange(each), text), samples)
    split_lens = np.tile([text, each - text], samples)
    return Pack(
        sequence_length=each * samples, sample_lens=np.full(samples, each), split_lens=split_lens, split_modes=np.tile([0, 2], samples),
        text_ids=np.zeros(len(text_positions), dtype=np.int64), text_positions=text_positions, position_ids=position_ids,
        vae_positions=vae_positions, latent_shapes=pairs, latent_position_ids=empty, vit_positions=empty, vit_position_ids=empty,
        vit_shapes=pairs, ce_positions=empty, labels=empty, ce_weights=np.zeros(0, dtype=np.float32), mse_positions=vae_positions,
    )  # fmt: skip


def _sequence_order(pack: Pack) -> TokenOrder:
    places = np.arange(pack.sequence_length)
    rows = (np.arange(len(pack.text_positions)), np.zeros(0, dtype=np.int64), np.arange(len(pack.vae_positions)))
    return TokenOrder(places, places, pack.sequence_length, *rows)


class _Sorted:
    """The model's own decoder stack."""

    def __init__(self, arch: BagelArch, pack: Pack, hidden: torch.Tensor, backend: str) -> None:
        self.order, device = expert_order(pack), platform.device()
        self.model = build_decoder(arch, megatron_config(arch)).to(device)
        self.hidden = hidden[torch.from_numpy(self.order.positions).to(device)]
        self.position_ids = torch.from_numpy(pack.position_ids[self.order.positions]).to(device)
        self.plan = attention_plan(backend, PackMask.of(pack), self.order, device)

    def run(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        out = self.model.decode(self.hidden, self.order.n_und, self.order.n_gen, self.position_ids, self.plan).squeeze(1)
        out.sum().backward()
        return out


class _Plain:
    """The gather/scatter stack with the weights of ``other``."""

    def __init__(self, arch: BagelArch, pack: Pack, hidden: torch.Tensor, other: _Sorted, backend: str) -> None:
        device = platform.device()
        self.layers = torch.nn.ModuleList(GatherScatterLayer(layer) for layer in other.model.decoder.layers).to(device)
        self.hidden, self.arch = hidden, arch
        self.position_ids = torch.from_numpy(pack.position_ids).to(device)
        self.rows = (torch.from_numpy(pack.text_positions).to(device), torch.from_numpy(pack.vae_positions).to(device))
        self.plan = attention_plan(backend, PackMask.of(pack), _sequence_order(pack), device)

    def run(self) -> torch.Tensor:
        self.layers.zero_grad(set_to_none=True)
        cos, sin = rotary_table(self.position_ids, self.arch.llm.head_dim, self.arch.llm.rope_theta)
        out = self.hidden
        for layer in self.layers:
            out = layer(out, self.rows, cos, sin, self.plan)
        out.sum().backward()
        return out


def _stacks(layers: int, hidden: int, tokens: int, backend: str | None = None) -> tuple[_Sorted, _Plain]:
    backend = backend or ("flex" if platform.has_gpu() else "sdpa")
    llm = LLMArch(hidden, hidden * 11 // 4, layers, hidden // 64, max(1, hidden // 256), 64, layer_module="Qwen2MoTDecoderLayer")
    arch = BagelArch(llm, autoencoder=AutoencoderArch())
    pack = half_generation_pack(tokens)
    torch.manual_seed(0)
    inputs = torch.randn(pack.sequence_length, hidden, device=platform.device())
    ours = _Sorted(arch, pack, inputs, backend)
    return ours, _Plain(arch, pack, inputs, ours, backend)


def _per_layer(hidden: int, tokens: int) -> tuple[OperatorCalls, OperatorCalls]:
    """Calls of one layer: two layers' minus one layer's, so that what happens once per step does not count.

    Attention is SDPA's on every device, since what counts the calls does not go together with compiled FlexAttention.
    """
    counts = [[count_operators(stack.run) for stack in _stacks(layers, hidden, tokens, "sdpa")] for layers in (1, 2)]
    return tuple(OperatorCalls(two.total - one.total, two.kernels - one.kernels) for one, two in zip(*counts, strict=True))


def compare_layers(hidden: int = 512, layers: int = 8, tokens: int = 2048, rounds: int = 7) -> dict[str, Any]:
    """Seconds of forward and backward of both stacks, operator calls per layer, and how far their results are apart."""
    ours, plain = _stacks(layers, hidden, tokens)
    with torch.no_grad():
        scale = float(plain.hidden.abs().max())
    difference = float((ours.run() - plain.run()[torch.from_numpy(ours.order.positions).to(platform.device())]).abs().max()) / scale
    sorted_seconds, plain_seconds = alternating_seconds(lambda: ours.run(), lambda: plain.run(), rounds)
    ours_calls, plain_calls = _per_layer(hidden, tokens)
    return {
        "hidden": hidden,
        "layers": layers,
        "tokens": tokens,
        "generation_tokens": ours.order.n_gen,
        "largest_difference": difference,
        "expert_sorted_s": statistics.median(sorted_seconds),
        "gather_scatter_s": statistics.median(plain_seconds),
        "speedup": statistics.median(p / o for o, p in zip(sorted_seconds, plain_seconds, strict=True)),
        "operator_calls_per_layer": {"expert_sorted": ours_calls.total, "gather_scatter": plain_calls.total},
        "operator_calls_ratio": ours_calls.total / plain_calls.total,
        "kernels_per_layer": {"expert_sorted": ours_calls.kernels, "gather_scatter": plain_calls.kernels},
        "kernels_ratio": ours_calls.kernels / plain_calls.kernels,
    }
