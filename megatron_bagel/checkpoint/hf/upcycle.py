# SPDX-License-Identifier: Apache-2.0
"""Turns the dense MLPs of a model folder into sparse experts: every expert starts as a copy of the MLP, and the router is seeded.

With weights that sum to 1 the new model computes what the dense one did, until training makes the experts differ (Komatsuzaki et al.,
"Sparse Upcycling", 2022).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_bagel.checkpoint.hf.folder import AUTOENCODER_FILE, HFFolder, PositionTable, WeightFile, write_folder
from megatron_bagel.checkpoint.hf.initial_weights import initial_value
from megatron_bagel.checkpoint.hf.load import check_against
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.config.architecture import BagelArch, SparseArch

_EXPERT = re.compile(r"\.experts\.local_experts\.\d+\.")


@dataclass(frozen=True)
class _Upcycled:
    """The weights of ``arch`` by our names, from a dense ``source``."""

    source: TensorSource
    dense: WeightMap
    arch: BagelArch
    seed: int

    def get(self, name: str) -> torch.Tensor:
        """Return a weight. A router is a function of the seed and its name."""
        entry = self.dense.entries.get(_EXPERT.sub(".", name))
        if entry is None:
            return initial_value(WeightMap(self.arch).entries[name], self.arch, self.seed)
        return entry.fuse([self.source.get(part) for part in entry.hf])

    def stored_type(self, name: str) -> torch.dtype:
        """Return the type of a weight in the dense folder; a router has that of the embedding."""
        entry = self.dense.entries.get(_EXPERT.sub(".", name)) or self.dense.entries["embedding.word_embeddings.weight"]
        return self.source.spec(entry.hf[0])[1]


def upcycle(folder: str | Path, out: str | Path, sparse: SparseArch, table: PositionTable, kind: str | None = None, seed: int = 0) -> Path:
    """Write a dense model folder as one with sparse experts.

    Args:
        folder: The dense model, in the released format.
        out: The folder to write; it must be absent or empty.
        sparse: The experts. Their width must be that of the dense MLPs, and there is no shared expert.
        table: Computes a position table.
        kind: The weights to take, "ema" or "model"; None takes what the folder has, "ema" first.
        seed: The seed of the routers.

    Returns:
        ``out``.

    Raises:
        ValueError: If the folder has experts already, or the experts cannot be copies of its MLPs.
    """
    source_folder = HFFolder(folder)
    dense = source_folder.arch
    if dense.llm.sparse is not None:
        raise ValueError(f"{folder} has sparse experts already; upcycling starts from a dense model")
    if sparse.moe_intermediate_size != dense.llm.intermediate_size:
        raise ValueError(
            f"--moe_ffn_hidden_size {sparse.moe_intermediate_size}: experts are copies of the dense MLPs, whose width is "
            f"{dense.llm.intermediate_size}; leave the flag out"
        )
    if sparse.shared_expert_intermediate_size is not None:
        raise ValueError("a shared expert has no dense weights to start from; leave it out")
    weights = kind or source_folder.default_weights()[0]
    dense = replace(dense, max_latent_size=source_folder.stored_latent_size(weights) or dense.max_latent_size)
    arch = replace(dense, llm=replace(dense.llm, sparse=sparse))
    reader, dense_map = source_folder.weights(weights), WeightMap(dense)
    check_against(reader, dense_map)
    upcycled = _Upcycled(reader, dense_map, arch, seed)
    file = WeightFile(upcycled.get, "keep", upcycled.stored_type)
    autoencoder = source_folder.path / AUTOENCODER_FILE
    has_tokenizer = any((source_folder.path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json"))
    return write_folder(
        out, arch, {weights: file}, table, tokenizer=source_folder.path if has_tokenizer else None,
        autoencoder=autoencoder if autoencoder.is_file() else None,
    )  # fmt: skip
