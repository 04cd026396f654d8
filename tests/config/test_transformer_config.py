# SPDX-License-Identifier: Apache-2.0
"""Megatron's configuration of a decoder: sizes, precision, recompute, and sums instead of averages."""

from __future__ import annotations

import torch

from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config

ARCH = LLMArch(32, 48, 2, 4, 2, 64, rms_norm_eps=1e-5, initializer_range=0.03)


def test_sizes_and_precision():
    config = transformer_config(ARCH)
    assert (config.num_layers, config.ffn_hidden_size, config.num_query_groups, config.kv_channels) == (2, 48, 2, 8)
    assert config.layernorm_epsilon == 1e-5 and config.init_method_std == 0.03 and config.add_qkv_bias and not config.add_bias_linear
    assert config.calculate_per_token_loss and config.params_dtype == torch.float32 and config.recompute_granularity is None
    assert transformer_config(ARCH, bf16=True).params_dtype == torch.bfloat16


def test_parallel_layout_and_recompute():
    asked = MegatronArguments(tensor_model_parallel_size=2, sequence_parallel=True, recompute_granularity="full", recompute_num_layers=2)
    config = transformer_config(ARCH, asked)
    assert config.tensor_model_parallel_size == 2 and config.sequence_parallel
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == ("full", "uniform", 2)


def test_overrides_win():
    assert transformer_config(ARCH, perform_initialization=False, init_method_std=0.5).init_method_std == 0.5
