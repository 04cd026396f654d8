# SPDX-License-Identifier: Apache-2.0
"""Which modules a decoder layer consists of: one builder, two sets of linears and norms.

``local`` is plain torch under Megatron-Core's tensor-parallel weights and runs everywhere; ``transformer_engine`` swaps the
linears and norms for Transformer Engine's, and applies the linears of both experts as one grouped linear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.lora import LoraSettings
from megatron_bagel.model.experts import LinearPair, MLPSubmodules
from megatron_bagel.model.layer import MoTLayer, MoTLayerSubmodules
from megatron_bagel.model.linear import NoCommColumnLinear, NoCommRowLinear
from megatron_bagel.model.lora import AdaptedColumnLinear, AdaptedRowLinear, AdapterShape
from megatron_bagel.model.norm import NormWeight, RMSNorm
from megatron_bagel.model.self_attention import AttentionSubmodules, CoreAttention


@dataclass(frozen=True)
class SpecModules:
    """The replaceable parts of a layer."""

    column_linear: type
    row_linear: type
    norm: type
    adapted_column: type
    adapted_row: type
    linear_pair: type[LinearPair] = LinearPair


LOCAL = SpecModules(NoCommColumnLinear, NoCommRowLinear, RMSNorm, AdaptedColumnLinear, AdaptedRowLinear)


def spec_modules(transformer_impl: str) -> SpecModules:
    """Return the parts for ``--transformer-impl``. Raises ValueError for an unknown name or a missing Transformer Engine."""
    if transformer_impl == "local":
        return LOCAL
    if transformer_impl == "transformer_engine":
        # The one place where Transformer Engine is asked for.
        try:
            from megatron_bagel.model.te_modules import AdaptedTEColumn, AdaptedTERow, TEColumn, TELinearPair, TENorm, TERow
        except ImportError as error:
            raise ValueError(
                "--transformer-impl transformer_engine needs the package transformer-engine (pip install megatron_bagel[cuda] on a "
                "machine with a GPU), or use --transformer-impl local"
            ) from error
        return SpecModules(TEColumn, TERow, TENorm, AdaptedTEColumn, AdaptedTERow, TELinearPair)
    raise ValueError(f"--transformer-impl {transformer_impl!r} is unknown; use local or transformer_engine")


def layer_spec(arch: LLMArch, modules: SpecModules = LOCAL, freeze_und: bool = False, lora: LoraSettings | None = None) -> ModuleSpec:
    """Return the spec of one decoder layer of the architecture's ``layer_module`` kind, with adapters where ``lora`` asks for them."""
    linears = _Linears(arch, modules, lora)
    submodules = MoTLayerSubmodules(
        norm=modules.norm,
        attention=replace(linears.attention("und"), gen=linears.attention("gen")),
        mlp=replace(linears.mlp("und"), gen=linears.mlp("gen")),
        two_attentions=arch.has_gen_attention,
        two_mlps=arch.has_gen_mlp,
        freeze_und=freeze_und,
        sparse_kinds=partial(_sparse_kinds, arch),
    )
    return ModuleSpec(module=MoTLayer, submodules=submodules)


def _sparse_kinds(arch: LLMArch, layer: int) -> list[str]:
    """Return the expert kinds whose MLPs are sparse in a layer."""
    return [kind for kind in ("und", "gen") if arch.is_sparse(layer, kind)]


@dataclass(frozen=True)
class _Linears:
    """The linears of each expert of a layer, with or without adapters."""

    arch: LLMArch
    modules: SpecModules
    lora: LoraSettings | None

    def attention(self, expert: str) -> AttentionSubmodules:
        return AttentionSubmodules(
            linear_qkv=self._linear(expert, "qkv", self.modules.column_linear, self.modules.adapted_column),
            linear_proj=self._linear(expert, "proj", self.modules.row_linear, self.modules.adapted_row),
            core_attention=CoreAttention,
            qk_layernorm=NormWeight if self.arch.qk_norm else None,
            linear_pair=self._pair,
        )

    def mlp(self, expert: str) -> MLPSubmodules:
        return MLPSubmodules(
            self._linear(expert, "fc1", self.modules.column_linear, self.modules.adapted_column),
            self._linear(expert, "fc2", self.modules.row_linear, self.modules.adapted_row),
            self._pair,
        )

    @property
    def _pair(self) -> type[LinearPair]:
        """Return what applies the linears of both experts. A grouped product knows nothing of adapters."""
        return self.modules.linear_pair if self.lora is None else LinearPair

    def _linear(self, expert: str, target: str, plain: type, adapted: type) -> ModuleSpec | type:
        if self.lora is None or not self.lora.adapts_linear(expert, target):
            return plain
        arch, halves = self.arch, False
        parts: tuple[int, ...] = (1,)
        if target == "qkv":
            queries = arch.num_attention_heads // arch.num_key_value_heads
            parts = (queries * arch.head_dim, arch.head_dim, arch.head_dim)
        elif target == "fc1":
            halves = True
        shape = AdapterShape(self.lora.rank, self.lora.scale, self.lora.dropout, parts, halves)
        return ModuleSpec(module=adapted, params={"adapter": shape})
