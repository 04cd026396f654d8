# SPDX-License-Identifier: Apache-2.0
"""Which modules a decoder layer consists of: one builder, two sets of linears and norms.

``local`` is plain torch under Megatron-Core's tensor-parallel weights and runs everywhere; ``transformer_engine`` swaps the
linears and norms for Transformer Engine's, and applies the linears of both experts as one grouped linear.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.model.experts import LinearPair, MLPSubmodules
from megatron_bagel.model.layer import MoTLayer, MoTLayerSubmodules
from megatron_bagel.model.linear import NoCommColumnLinear, NoCommRowLinear
from megatron_bagel.model.norm import NormWeight, RMSNorm
from megatron_bagel.model.self_attention import AttentionSubmodules, CoreAttention


@dataclass(frozen=True)
class SpecModules:
    """The replaceable parts of a layer."""

    column_linear: type
    row_linear: type
    norm: type
    linear_pair: type[LinearPair] = LinearPair


LOCAL = SpecModules(NoCommColumnLinear, NoCommRowLinear, RMSNorm)


def spec_modules(transformer_impl: str) -> SpecModules:
    """Return the parts for ``--transformer-impl``. Raises ValueError for an unknown name or a missing Transformer Engine."""
    if transformer_impl == "local":
        return LOCAL
    if transformer_impl == "transformer_engine":
        # The one place where Transformer Engine is asked for.
        try:
            from megatron_bagel.model.te_modules import TEColumn, TELinearPair, TENorm, TERow
        except ImportError as error:
            raise ValueError(
                "--transformer-impl transformer_engine needs the package transformer-engine (pip install megatron_bagel[cuda] on a "
                "machine with a GPU), or use --transformer-impl local"
            ) from error
        return SpecModules(TEColumn, TERow, TENorm, TELinearPair)
    raise ValueError(f"--transformer-impl {transformer_impl!r} is unknown; use local or transformer_engine")


def layer_spec(arch: LLMArch, modules: SpecModules = LOCAL, freeze_und: bool = False) -> ModuleSpec:
    """Return the spec of one decoder layer of the architecture's ``layer_module`` kind."""
    attention = AttentionSubmodules(
        linear_qkv=modules.column_linear,
        linear_proj=modules.row_linear,
        core_attention=CoreAttention,
        qk_layernorm=NormWeight if arch.qk_norm else None,
        linear_pair=modules.linear_pair,
    )
    submodules = MoTLayerSubmodules(
        norm=modules.norm,
        attention=attention,
        mlp=MLPSubmodules(modules.column_linear, modules.row_linear, modules.linear_pair),
        two_attentions=arch.has_gen_attention,
        two_mlps=arch.has_gen_mlp,
        freeze_und=freeze_und,
        sparse_kinds=partial(_sparse_kinds, arch),
    )
    return ModuleSpec(module=MoTLayer, submodules=submodules)


def _sparse_kinds(arch: LLMArch, layer: int) -> list[str]:
    """Return the expert kinds whose MLPs are sparse in a layer."""
    return [kind for kind in ("und", "gen") if arch.is_sparse(layer, kind)]
