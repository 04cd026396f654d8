# SPDX-License-Identifier: Apache-2.0
"""The sparse experts inside an MLP, under the names of Qwen3-MoE's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_bagel.config.whole_numbers import require_sizes

#: The expert kinds of a decoder: one for text and ViT tokens, one for VAE tokens.
KINDS = ("und", "gen")
_NAMES = {
    "num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "mlp_only_layers", "norm_topk_prob",
    "shared_expert_intermediate_size", "shared_expert_gate", "sparse_kinds", "decoder_sparse_step", "moe_layer_freq", "moe_first_k_dense",
}  # fmt: skip


@dataclass(frozen=True)
class SparseArch:
    """The router and experts that replace an MLP. Both expert kinds have the same sizes.

    Attributes:
        num_experts: The experts of one MLP.
        num_experts_per_tok: The experts that serve a token.
        moe_intermediate_size: The width of one expert.
        mlp_only_layers: The layers, counted from 0, whose MLPs stay dense.
        norm_topk_prob: Whether the weights of a token's experts sum to 1.
        shared_expert_intermediate_size: The width of an expert that serves every token, or None without one.
        shared_expert_gate: Whether the result of the shared expert is scaled by a gate.
        sparse_kinds: The expert kinds with sparse MLPs: ``und``, ``gen`` or both.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    mlp_only_layers: tuple[int, ...] = ()
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    sparse_kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        require_sizes(self, ("num_experts", "num_experts_per_tok", "moe_intermediate_size"), "LLM")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"--moe_router_topk (num_experts_per_tok) is {self.num_experts_per_tok}, more than the {self.num_experts} experts"
            )
        if self.num_experts_per_tok == 1 and self.norm_topk_prob:
            raise ValueError(
                "num_experts_per_tok 1 with norm_topk_prob true gives every token the weight 1, and the router no gradient; set "
                "--moe_router_pre_softmax True (norm_topk_prob false)"
            )
        if not self.sparse_kinds or not set(self.sparse_kinds) <= set(KINDS):
            raise ValueError(f"--moe_kinds {' '.join(self.sparse_kinds)}: name und, gen or both")
        if self.shared_expert_gate and self.shared_expert_intermediate_size is None:
            raise ValueError("--moe_shared_expert_gate True needs --moe_shared_expert_intermediate_size")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> SparseArch | None:
        """Read the settings of Qwen3-MoE (or Qwen2-MoE) from a ``config.json``, or return None for a dense decoder.

        The keys ``moe_layer_freq`` and ``moe_first_k_dense``, which flags add, win over those of the file.

        Raises:
            ValueError: for a decoder with experts that lacks the number of experts per token, or a pattern that does not fit its layers.
        """
        num_experts = config.get("num_experts") or config.get("num_local_experts")  # transformers 5 writes the latter
        if not num_experts:
            return None
        if config.get("num_experts_per_tok") is None:
            raise ValueError("LLM config has num_experts but no num_experts_per_tok; give --moe_router_topk")
        return cls(
            num_experts=num_experts,
            num_experts_per_tok=config["num_experts_per_tok"],
            moe_intermediate_size=config.get("moe_intermediate_size") or config["intermediate_size"],
            mlp_only_layers=_dense_layers(config),
            norm_topk_prob=bool(config.get("norm_topk_prob", False)),
            shared_expert_intermediate_size=config.get("shared_expert_intermediate_size") or None,
            # Qwen2-MoE has a gate and no key for it.
            shared_expert_gate=bool(config.get("shared_expert_gate", config.get("model_type") == "qwen2_moe")),
            sparse_kinds=tuple(config.get("sparse_kinds") or KINDS),
        )

    def to_hf(self) -> dict[str, Any]:
        """Return the settings as keys of a ``config.json``. ``from_hf`` reads them back."""
        step = {"decoder_sparse_step": 1}
        return {**asdict(self), "mlp_only_layers": list(self.mlp_only_layers), "sparse_kinds": list(self.sparse_kinds), **step}


def without_experts(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a ``config.json`` that say nothing of experts."""
    return {name: value for name, value in config.items() if name not in _NAMES}


def _dense_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers whose MLPs are dense, by the flags' pattern if there is one, else by the keys of Qwen3-MoE."""
    layers = range(int(config.get("num_hidden_layers") or 0))
    pattern, first_dense = config.get("moe_layer_freq"), int(config.get("moe_first_k_dense") or 0)
    if not pattern:
        step, named = config.get("decoder_sparse_step") or 1, {int(layer) for layer in config.get("mlp_only_layers") or ()}
        return tuple(layer for layer in layers if layer in named or (layer + 1) % step or layer < first_dense)
    if len(pattern) == 1 and pattern[0] >= 1:
        pattern = [int(layer % pattern[0] == 0) for layer in layers]
    if len(pattern) != len(layers) or not set(pattern) <= {0, 1}:
        raise ValueError(
            f"--moe_layer_freq {' '.join(map(str, pattern))}: give N for every N-th layer, or a 0 or 1 for each of the {len(layers)} layers"
        )
    return tuple(layer for layer in layers if not pattern[layer] or layer < first_dense)
