# SPDX-License-Identifier: Apache-2.0
"""The parameters of a model as one rank holds them: shapes from the weight map, divided by the parallel sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod

from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import LLMArch
from megatron_bagel.config.lora import is_factor
from megatron_bagel.config.parallel_sizes import padded_vocabulary
from megatron_bagel.costs.freezing import TOWER_PARTS, is_frozen
from megatron_bagel.costs.inputs import CostInputs

_TENSOR_PARALLEL_PARTS = ("linear_qkv.", "linear_proj.", "linear_fc1.", "linear_fc2.", "word_embeddings.", "output_layer.")
_CUT_FACTORS = (("linear_qkv.", "lora_B"), ("linear_fc1.", "lora_B"), ("linear_proj.", "lora_A"), ("linear_fc2.", "lora_A"))
_EXPERT = re.compile(r"\.local_experts\.0\.")
ROUTER = ".router.weight"


@dataclass(frozen=True)
class RankTensor:
    """A parameter as a tensor-parallel rank holds it, and its decoder layer (None outside the decoder).

    ``copies`` tensors of ``numel`` elements each are alike: the experts of a sparse MLP.
    """

    name: str
    numel: int
    layer: int | None
    frozen: bool
    copies: int = 1

    @property
    def total(self) -> int:
        """Return the elements of all copies."""
        return self.numel * self.copies

    @property
    def is_expert(self) -> bool:
        """Return whether it belongs to sparse experts."""
        return _EXPERT.search(self.name) is not None

    @property
    def is_tower(self) -> bool:
        """Return whether it belongs to the vision tower, which tensor parallelism never shards."""
        return self.name.startswith(TOWER_PARTS)


def rank_tensors(inputs: CostInputs) -> list[RankTensor]:
    """Return the tensors of a rank, over all stages."""
    arch, megatron, frozen = inputs.arch, inputs.megatron, inputs.frozen
    tp, sparse = megatron.tensor_model_parallel_size, arch.llm.sparse
    rows = padded_vocabulary(arch.llm.vocab_size, tp, megatron.make_vocab_size_divisible_by)
    # Rows that pad the vocabulary take memory like any other.
    entries = WeightMap(replace(arch, llm=_with_one_expert(replace(arch.llm, vocab_size=rows)))).entries
    if frozen.lora is not None:
        entries |= AdapterMap(arch, frozen.lora).entries
    tensors = []
    for name, entry in entries.items():
        numel, copies, ranks = prod(entry.shape), 1, tp
        if sparse is not None and name.endswith(ROUTER):
            numel *= sparse.num_experts
        if sparse is not None and _EXPERT.search(name):
            copies, ranks = sparse.num_experts // megatron.expert_model_parallel_size, megatron.expert_tensor_size(tp)
        layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
        is_fixed = is_frozen(name, entries, arch.llm.tie_word_embeddings, frozen)
        tensors.append(RankTensor(name, numel // (ranks if _is_sharded(name) else 1), layer, is_fixed, copies))
    return tensors


def _with_one_expert(llm: LLMArch) -> LLMArch:
    """Return a decoder whose sparse MLPs have one expert. All experts have the same shape, and a map of thousands takes long."""
    if llm.sparse is None:
        return llm
    return replace(llm, sparse=replace(llm.sparse, num_experts=1, num_experts_per_tok=1, norm_topk_prob=False))


def _is_sharded(name: str) -> bool:
    if is_factor(name):
        # A column linear cuts B, a row linear cuts A.
        return any(f"{linear}{factor}" in name for linear, factor in _CUT_FACTORS)
    return not name.startswith(TOWER_PARTS) and any(part in name for part in _TENSOR_PARALLEL_PARTS)
