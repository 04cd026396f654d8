# SPDX-License-Identifier: Apache-2.0
"""Pretrained Qwen2.5, Qwen3 and SigLIP folders seen in BAGEL's released format, so that one strict loader serves every start.

Each folder becomes a *source* (load.py) under the released names; initial_weights.py combines them with seeded values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, TensorSpec
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)

# Parts of a SigLIP checkpoint that BAGEL's vision tower does not use: pooling head, text tower, contrastive scale.
_SIGLIP_UNUSED = re.compile(r"^(vision_model\.head\.|text_model\.|logit_scale$|logit_bias$|vision_model\.embeddings\.position_ids$)")
_SIGLIP_NAMES = re.compile(r"^(vision_model|text_model)\.|^logit_(scale|bias)$")
_SIGLIP_LAYER = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.")


#: All experts of a layer in one tensor, as transformers holds them: [experts, 2 * width, h] and [experts, h, width].
_STACKED = re.compile(r"^model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)$")


def _unchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class View:
    """A source made of other sources' tensors: released name -> (source, name in it, change of the tensor)."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._sources: dict[str, tuple[TensorSource, str, Callable[[torch.Tensor], torch.Tensor]]] = {}

    def add(self, name: str, source: TensorSource, source_name: str, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        """Define ``name`` as ``change(source[source_name])``."""
        self._sources[name] = (source, source_name, change or _unchanged)

    def alias(self, name: str, target: str) -> None:
        """Define ``name`` as the same tensor as ``target``."""
        self._sources[name] = self._sources[target]

    def merge(self, view: View) -> None:
        """Add all tensors of another view."""
        self._sources.update(view._sources)

    def keys(self) -> list[str]:
        """Return all released names of this view."""
        return list(self._sources)

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def spec(self, name: str) -> TensorSpec:
        """Return shape and dtype after the change, which is applied to a tensor without data."""
        source, source_name, change = self._sources[name]
        shape, dtype = source.spec(source_name)
        return tuple(change(torch.empty(shape, dtype=dtype, device="meta")).shape), dtype

    def origin(self, name: str) -> tuple[SafetensorsReader, str]:
        """Return the reader of the files that hold the tensor, and its name there."""
        source, source_name, _ = self._sources[name]
        return source.origin(source_name)

    def get(self, name: str) -> torch.Tensor:
        """Read the tensor now and change it."""
        source, source_name, change = self._sources[name]
        return change(source.get(source_name))

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read the tensor now into ``out``. A tensor that is changed is read first."""
        source, source_name, change = self._sources[name]
        if change is _unchanged:
            source.read_into(source_name, out)
        else:
            out.copy_(change(source.get(source_name)).reshape(out.shape))

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Read a part of the tensor. A tensor that is changed is read whole."""
        source, source_name, change = self._sources[name]
        if change is _unchanged:
            return source.get_slice(source_name, dim, start, stop)
        return self.get(name).narrow(dim, start, stop - start)


def folder_weights(folder: str | Path, flag: str, check_weights: WeightCheck = "sampled") -> SafetensorsReader:
    """Open ``model.safetensors`` of a Hugging Face folder, single or sharded. Raises ValueError naming ``flag``."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{flag}: there is no folder {folder}")
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (folder / name).is_file():
            return SafetensorsReader(folder / name, check_weights)
    raise ValueError(
        f"{flag}: {folder} holds neither model.safetensors nor model.safetensors.index.json (pickled .bin weights are not read). "
        "A training run may start from seeded random weights on purpose: --init_random True"
    )


def llm_source(
    folder: str | Path, arch: BagelArch, extra_rows: Callable[[Entry], torch.Tensor], check_weights: WeightCheck = "sampled"
) -> View:
    """View a Qwen2-style folder under BAGEL's names.

    ``extra_rows(entry)`` (the full start value) fills a vocabulary larger than the file's; a vocabulary is never truncated. If the file
    ties its head to the embedding and this model does not, the head starts as the embedding. If only this model ties them, the file's
    head is not used.

    Raises:
        ValueError: If the file has more vocabulary rows than the model.
    """
    reader = folder_weights(folder, "--llm_path", check_weights)
    sources = {f"language_model.{name}": name for name in reader.keys()}  # noqa: SIM118
    head = "language_model.lm_head.weight"
    if arch.llm.tie_word_embeddings:
        sources.pop(head, None)
    elif head not in sources and "model.embed_tokens.weight" in reader:
        sources[head] = "model.embed_tokens.weight"
    view, weight_map = View(reader.path), WeightMap(arch)
    for name, source_name in sources.items():
        if _STACKED.match(source_name):
            _add_stacked_experts(view, name, reader, source_name)
            continue
        entry = weight_map.by_hf.get(name)
        rows = reader.spec(source_name)[0][:1]
        if entry is None or not entry.vocabulary or rows == entry.shape[:1]:
            view.add(name, reader, source_name)
        elif rows > entry.shape[:1]:
            raise ValueError(
                f"{reader.path}: {source_name} has {rows[0]} vocabulary rows, more than the {entry.shape[0]} of this model; a vocabulary "
                "is never truncated: leave vocab_size as in the folder's config.json"
            )
        else:
            view.add(name, reader, source_name, partial(_grow, entry=entry, extra_rows=extra_rows))
    return view


def _add_stacked_experts(view: View, name: str, reader: SafetensorsReader, source_name: str) -> None:
    """Add each expert of a stacked tensor under the name that a single expert has."""
    prefix, projection = name.rsplit(".", 1)
    for number in range(reader.spec(source_name)[0][0]):
        if projection == "down_proj":
            view.add(f"{prefix}.{number}.down_proj.weight", reader, source_name, partial(_expert, number=number))
            continue
        for half, part in enumerate(("gate_proj", "up_proj")):
            view.add(f"{prefix}.{number}.{part}.weight", reader, source_name, partial(_expert, number=number, half=half))


def _expert(stacked: torch.Tensor, number: int, half: int | None = None) -> torch.Tensor:
    expert = stacked[number]
    return expert if half is None else expert.chunk(2)[half]


def grown_source(reader: SafetensorsReader, weight_map: WeightMap, extra_rows: Callable[[Entry], torch.Tensor]) -> View:
    """View a model folder's weights with a vocabulary as large as the model's: rows that the file lacks are those of ``extra_rows``."""
    view = View(reader.path)
    for name in reader.keys():  # noqa: SIM118
        entry = weight_map.by_hf.get(name)
        rows = reader.spec(name)[0][:1]
        if entry is None or not entry.vocabulary or rows >= entry.shape[:1]:
            view.add(name, reader, name)
            continue
        logger.info("%s: %s grows from %d to %d rows; the new ones start from seeded values", reader.path, name, *rows, *entry.shape[:1])
        view.add(name, reader, name, partial(_grow, entry=entry, extra_rows=extra_rows))
    return view


def vit_source(folder: str | Path, arch: BagelArch, check_weights: WeightCheck = "sampled") -> View:
    """View a SigLIP folder under BAGEL's names: the patch convolution becomes a linear, layers past the selected one are dropped."""
    reader = folder_weights(folder, "--vit_path", check_weights)
    view, dropped = View(reader.path), []
    for source_name in reader.keys():  # noqa: SIM118
        # transformers 5 saves a vision tower without the prefix that earlier releases and BAGEL use.
        name = source_name if _SIGLIP_NAMES.match(source_name) else f"vision_model.{source_name}"
        layer = _SIGLIP_LAYER.match(name)
        if _SIGLIP_UNUSED.match(name) or (layer and int(layer.group(1)) >= arch.n_vit_layers):
            dropped.append(source_name)
        elif name.endswith("patch_embedding.weight"):
            view.add(f"vit_model.{name}", reader, source_name, patch_convolution_to_linear)
        else:
            view.add(f"vit_model.{name}", reader, source_name)
    if dropped:
        logger.info(
            "%s: %d tensors not used (layers after the %d selected, heads, text tower)", reader.path, len(dropped), arch.n_vit_layers
        )
    return view


def patch_convolution_to_linear(weight: torch.Tensor) -> torch.Tensor:
    """Turn [width, channels, rows, columns] into [width, rows*columns*channels]; a linear weight is returned unchanged."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1) if weight.ndim == 4 else weight


def grown_vocabulary(arch: BagelArch, tokens: int) -> BagelArch:
    """Return ``arch`` with at least ``tokens`` vocabulary rows. Rows that pad the vocabulary past the tokenizer always stay."""
    if tokens <= arch.llm.vocab_size:
        return arch
    logger.info("vocabulary grows from %d to %d rows for the tokenizer", arch.llm.vocab_size, tokens)
    return replace(arch, llm=replace(arch.llm, vocab_size=tokens))


def _grow(tensor: torch.Tensor, entry: Entry, extra_rows: Callable[[Entry], torch.Tensor]) -> torch.Tensor:
    if tensor.is_meta:
        return tensor.new_empty(entry.shape)
    return torch.cat([tensor, extra_rows(entry)[tensor.shape[0] :].to(tensor.dtype)])
