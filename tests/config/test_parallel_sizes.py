# SPDX-License-Identifier: Apache-2.0
"""Impossible parallel sizes are refused with the sizes that work."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.parallel_sizes import check_parallel_sizes, padded_vocabulary, virtual_stages
from megatron_bagel.config.transformer_config import transformer_config

RELEASED = LLMArch(
    hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064
)
TP, PP, VPP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
CP, COMM = "context_parallel_size", "cp_comm_type"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"


def llm(**sizes: int) -> LLMArch:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2}
    return LLMArch(**{**small, "vocab_size": 64, **sizes})


@pytest.mark.parametrize(
    ("arch", "sizes", "message"),
    [
        (RELEASED, {TP: 8}, r"--tensor_model_parallel_size 8: the model's 28 attention heads .* sizes that work: 1, 2 or 4$"),
        (llm(intermediate_size=98), {TP: 4}, r"98 channels of the MLP"),
        (
            llm(num_attention_heads=12, num_key_value_heads=4, hidden_size=96, vocab_size=72),
            {TP: 6},
            r"neither a divisor nor a multiple of the model's 4",
        ),
        (RELEASED, {PP: 3}, r"28 layers cannot be divided evenly among 3 stages .* sizes that work: 1, 2, 4, 7, 14 or 28"),
        (llm(), {PP: 2, VPP: 3}, r"2 stages of 3 chunk\(s\)"),
        (llm(), {PP: 2, "num_layers_per_virtual_pipeline_stage": 3}, r"does not divide .* sizes that work: 1, 2 or 4"),
        (llm(), {PP: 2, VPP: 4, "num_layers_per_virtual_pipeline_stage": 2}, r"contradict each other"),
        (llm(), {PP: 4, FIRST: 1}, r"leave 7 of 8 layers for 3 other stages"),
        (llm(), {PP: 2, FIRST: 1, LAST: 6}, r"leave 1 of 8 layers for 0 other stages"),
        (RELEASED, {CP: 8, COMM: "a2a"}, r"28 heads and 4 key/value heads .* sizes that work: 1, 2 or 4, or use --cp_comm_type all_gather"),
        (llm(), {TP: 2, CP: 2, COMM: "a2a"}, r"4 heads and 1 key/value heads of a tensor-parallel rank .* sizes that work: 1, or use"),
        (llm(), {PP: 3, VPP: 2, FIRST: 2, LAST: 3}, r"2 chunks per stage do not divide stages of 2, 3 and 3 layers"),
    ],
)
def test_impossible_sizes_are_refused_with_those_that_work(arch: LLMArch, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parallel_sizes(MegatronArguments(**sizes), arch)


def test_possible_sizes_pass() -> None:
    for arch, sizes in (
        (RELEASED, {TP: 4, PP: 7, VPP: 2}),
        (llm(), {TP: 8, CP: 16}),
        (llm(), {CP: 2, COMM: "a2a"}),
        (llm(), {PP: 3, FIRST: 1, LAST: 3}),
        (llm(), {PP: 2, FIRST: 6}),
        (llm(), {PP: 2, "num_layers_per_virtual_pipeline_stage": 2}),
    ):
        check_parallel_sizes(MegatronArguments(**sizes), arch)
    assert virtual_stages(MegatronArguments(**{PP: 2, "num_layers_per_virtual_pipeline_stage": 2}), 8) == 2
    assert virtual_stages(MegatronArguments(**{PP: 2, VPP: 1}), 8) is None


@given(st.integers(1, 8), st.integers(2, 6), st.one_of(st.none(), st.integers(2, 3)), *[st.one_of(st.none(), st.integers(1, 5))] * 2)
def test_what_passes_megatron_accepts(tensor: int, stages: int, chunks: int | None, first: int | None, last: int | None) -> None:
    sizes = {TP: tensor, PP: stages, VPP: chunks, FIRST: first, LAST: last}
    megatron, arch = MegatronArguments(**sizes), llm(num_hidden_layers=12)
    try:
        check_parallel_sizes(megatron, arch)
    except ValueError:
        return
    assert isinstance(transformer_config(arch, megatron), TransformerConfig)


@given(st.integers(1, 10_000), st.integers(1, 16), st.integers(1, 128))
def test_vocabularies_are_padded_to_the_next_multiple(tokens: int, tensor: int, divisor: int) -> None:
    rows = padded_vocabulary(tokens, tensor, divisor)
    assert rows % (tensor * divisor) == 0 and 0 <= rows - tokens < tensor * divisor
    assert padded_vocabulary(rows, tensor, divisor) == rows
