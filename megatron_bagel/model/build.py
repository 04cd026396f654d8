# SPDX-License-Identifier: Apache-2.0
"""The one function that builds a pipeline stage of the decoder from an architecture and a Megatron ``TransformerConfig``."""

from __future__ import annotations

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora import LoraSettings
from megatron_bagel.model.bagel import BagelModel
from megatron_bagel.model.kernels.choice import KernelsName, kernels_named, use_kernels
from megatron_bagel.model.lora import adapt_plain_linears, set_draw_keys
from megatron_bagel.model.specs import layer_spec, spec_modules


def build_decoder(
    arch: BagelArch,
    config: TransformerConfig,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    freeze_und: bool = False,
    transformer_impl: str = "local",
    vocab_divisor: int = 1,
    lora: LoraSettings | None = None,
    ce_chunk_tokens: int = 0,
    fused_kernels: KernelsName = "eager",
) -> BagelModel:
    """Build one pipeline stage with Megatron's random weights, and adapters where ``lora`` asks for them.

    ``padded_vocabulary`` explains ``vocab_divisor``, and ``cross_entropy.py`` explains ``ce_chunk_tokens`` (0: all loss tokens together).
    ``fused_kernels`` names the elementwise kernels of the layers and the final norms (``kernels/choice.py``).
    """
    spec = layer_spec(arch.llm, spec_modules(transformer_impl), freeze_und, lora)
    model = BagelModel(config, arch, spec, pre_process, post_process, vp_stage, freeze_und, vocab_divisor, ce_chunk_tokens)
    use_kernels(model, kernels_named(fused_kernels))
    if lora is not None:
        adapt_plain_linears(model, lora)
        set_draw_keys(model.decoder.layers)
        model.input_requires_grad = True
    return model
