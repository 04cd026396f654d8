# SPDX-License-Identifier: Apache-2.0
"""A tensor-parallel rank reads its part of a model folder and not the rest, and gets the part that slicing whole tensors gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from torch import nn

from megatron_bagel.assembly.meta_init import materialize, on_meta
from megatron_bagel.checkpoint.hf import load
from megatron_bagel.checkpoint.hf.folder import HFFolder
from megatron_bagel.checkpoint.hf.load import load_weights, named_weights
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.transformer_config import transformer_config
from megatron_bagel.model.build import build_decoder
from megatron_bagel.parallel.kv_sharing import initialize_kv_sharing
from megatron_bagel.platform.launch.fake_world import fake_world

IO = Path("/proc/self/io")


def bytes_read() -> int:
    """The bytes that this process has asked the system for."""
    return int(IO.read_text().split()[1])


def decoder_of_rank(arch: BagelArch, tensor: int, pipeline: int, divisor: int) -> nn.Module:
    parallel_state.initialize_model_parallel(tensor, pipeline, create_gloo_process_groups=False)
    megatron = MegatronArguments(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    initialize_kv_sharing(arch.llm.num_key_value_heads)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    with on_meta():
        decoder = build_decoder(arch, transformer_config(arch.llm, megatron), first, last, vocab_divisor=divisor)
    materialize(decoder, torch.device("cpu"), torch.bfloat16)
    return decoder


def ranks() -> Iterator[tuple[int, int, int, int]]:
    """(rank, tensor, pipeline, divisor of the vocabulary): with as many key/value heads as ranks, fewer, and a padded vocabulary."""
    for tensor, pipeline, divisor in ((2, 1, 1), (2, 2, 1), (2, 1, 384), (4, 1, 1)):
        for rank in range(tensor * pipeline):
            yield rank, tensor, pipeline, divisor


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.skipif(not IO.exists(), reason="counts the bytes that Linux counts")
def test_each_rank_reads_its_share(goldens: Path, tied: bool) -> None:
    arch = HFFolder(goldens / "hf").arch
    arch = replace(arch, vit=None, llm=replace(arch.llm, tie_word_embeddings=tied))
    weight_map, source = WeightMap(arch), HFFolder(goldens / "hf").weights()
    for rank, tensor, pipeline, divisor in ranks():
        with fake_world(rank, tensor * pipeline):
            decoder = decoder_of_rank(arch, tensor, pipeline, divisor)
            with patch.object(load, "_check_copies"):  # the goldens' head is not tied
                before = bytes_read()
                load_weights(source, weight_map, [decoder])
                read = bytes_read() - before
            parts = {name: parameter.detach().clone() for name, parameter in named_weights([decoder]).items()}
            with patch.object(load, "_check_copies"), patch.object(load, "_reads_parts", lambda *_: False):
                load_weights(source, weight_map, [decoder])
            whole = named_weights([decoder])
        assert all(torch.equal(part, whole[name]) for name, part in parts.items()), (rank, tensor, pipeline)
        share = sum(part.nbytes for part in parts.values())
        if arch.llm.num_key_value_heads % tensor == 0:
            assert read <= 1.05 * share, (rank, tensor, pipeline, read / share)
