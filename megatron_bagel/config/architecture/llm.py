# SPDX-License-Identifier: Apache-2.0
"""The shape of the decoder: Qwen2, Qwen3, and BAGEL's layers with two experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_bagel.config.architecture.settings import field_values, require_settings, split_settings
from megatron_bagel.config.architecture.sparse import SparseArch, without_experts
from megatron_bagel.config.whole_numbers import require_sizes

_LAYER_MODULES = ("Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer")
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass
class LLMArch:
    """The shape of a Qwen2-style decoder. ``layer_module`` says which parts exist twice, once per expert."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    layer_module: str = "Qwen2MoTDecoderLayer"
    attention_bias: bool = True
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    #: Width of a head where it is not hidden size over heads (Qwen3).
    kv_channels: int | None = None
    #: The experts that replace MLPs, or None for a dense decoder.
    sparse: SparseArch | None = None
    #: Keys of the source file that this code does not interpret. They are written back unchanged.
    extra: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
        require_sizes(self, sizes if self.kv_channels is None else (*sizes, "kv_channels"), "LLM")
        if self.layer_module not in _LAYER_MODULES:
            raise ValueError(f"layer_module {self.layer_module!r} is not one of {', '.join(_LAYER_MODULES)}")
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head size {self.head_dim} must be even for rotary positions")
        if self.sparse is not None and not any(map(self.is_sparse, range(self.num_hidden_layers))):
            raise ValueError(f"all {self.num_hidden_layers} layers are dense by moe_layer_freq (mlp_only_layers); leave num_experts out")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def has_gen_mlp(self) -> bool:
        """Whether VAE tokens have an MLP of their own (the MoE and the MoT layer)."""
        return self.layer_module != "Qwen2DecoderLayer"

    @property
    def has_gen_attention(self) -> bool:
        """Whether VAE tokens have attention weights and layer norms of their own (the MoT layer)."""
        return self.layer_module == "Qwen2MoTDecoderLayer"

    def is_sparse(self, layer: int, kind: str | None = None) -> bool:
        """Return whether the MLP of ``kind`` ("und" or "gen"; None asks for any) in ``layer``, counted from 0, consists of experts.

        An MLP that serves all tokens counts as sparse if either kind is.
        """
        if self.sparse is None or layer in self.sparse.mlp_only_layers:
            return False
        return kind is None or not self.has_gen_mlp or kind in self.sparse.sparse_kinds

    @classmethod
    def from_hf(cls, config: dict[str, Any], **overrides: Any) -> LLMArch:
        """Read the content of a ``config.json`` of Qwen2 or an ``llm_config.json`` of BAGEL.

        A ``head_dim`` key counts in Qwen3's files alone: the original does not use it in Qwen2's.

        Args:
            config: Content of the JSON file.
            **overrides: Settings that win over the file, such as ``layer_module``: a plain Qwen2 folder knows nothing of experts.

        Raises:
            ValueError: for a size that is missing, and for a decoder that this code cannot build.
        """
        settings = dict(config)
        rope = config.get("rope_parameters") or {}  # where transformers 5 writes rope_theta
        if settings.get("rope_theta") is None and rope.get("rope_theta") is not None:
            settings["rope_theta"] = rope["rope_theta"]
        _check_supported(config, rope)
        require_settings(settings, _SIZES, "LLM")
        if str(settings.get("model_type", "")).startswith("qwen3"):
            settings.setdefault("kv_channels", settings.get("head_dim"))
        settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
        # A plain Qwen2 folder has no qk_norm key and no such weights. A caller who adds them says so in ``overrides``.
        settings.setdefault("qk_norm", False)
        settings.setdefault("layer_module", "Qwen2DecoderLayer")
        settings.update({name: value for name, value in overrides.items() if value is not None})
        sparse = SparseArch.from_hf(settings)
        known, extra = split_settings(without_experts(settings), cls)
        return cls(**known, sparse=sparse, extra=extra)

    def to_hf(self) -> dict[str, Any]:
        """Return the ``llm_config.json`` of the released format."""
        settings = field_values(self)
        if self.attention_bias:
            del settings["attention_bias"]  # Qwen2 always has it; its config has no such key
        kv_channels, sparse = settings.pop("kv_channels"), settings.pop("sparse")
        if kv_channels is not None:
            settings |= {"model_type": "qwen3" if sparse is None else "qwen3_moe", "head_dim": kv_channels}
        if sparse is not None:
            settings |= sparse.to_hf()
        defaults = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "attention_dropout": 0.0}
        return {**defaults, **self.extra, **settings}


def _check_supported(config: dict[str, Any], rope: dict[str, Any]) -> None:
    scaling = config.get("rope_scaling") or (rope if rope.get("rope_type", "default") != "default" else None)
    if scaling:
        raise ValueError(f"LLM config asks for rope scaling {scaling}; only unscaled rotary positions are supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"LLM config has hidden_act {config['hidden_act']!r}; the decoder's MLP is SwiGLU (silu)")
