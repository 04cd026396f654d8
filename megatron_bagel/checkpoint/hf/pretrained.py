"""Pretrained Qwen2.5, Qwen3 and SigLIP folders seen as BAGEL's layout, so that one strict loader serves every start.

Each folder becomes a *source* (load.py) under the released names; initial_weights.py puts them together with seeded values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_bagel.checkpoint.hf.load import TensorSource
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, TensorSpec
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)

# Parts of a SigLIP checkpoint that BAGEL's vision tower has no use for: pooling head, text tower, contrastive scale.
_SIGLIP_UNUSED = re.compile(r"^(vision_model\.head\.|text_model\.|logit_scale$|logit_bias$|vision_model\.embeddings\.position_ids$)")
_SIGLIP_NAMES = re.compile(r"^(vision_model|text_model)\.|^logit_(scale|bias)$")
_SIGLIP_LAYER = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.")


class View:
    """A source made of other sources' tensors: released name -> (source, name there, change of the tensor)."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._where: dict[str, tuple[TensorSource, str, Callable[[torch.Tensor], torch.Tensor]]] = {}

    def add(self, name: str, source: TensorSource, there: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> None:
        """Let `name` be `change(source[there])`."""
        self._where[name] = (source, there, change)

    def alias(self, name: str, known: str) -> None:
        """Let `name` be what `known` is."""
        self._where[name] = self._where[known]

    def merge(self, other: View) -> None:
        """Offer what `other` offers, too."""
        self._where.update(other._where)

    def keys(self) -> list[str]:
        """All released names this view offers."""
        return list(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype after the change, found on a tensor without data."""
        source, there, change = self._where[name]
        shape, dtype = source.spec(there)
        return tuple(change(torch.empty(shape, dtype=dtype, device="meta")).shape), dtype

    def get(self, name: str) -> torch.Tensor:
        """The tensor, read and changed now."""
        source, there, change = self._where[name]
        return change(source.get(there))


def folder_weights(folder: str | Path, flag: str) -> SafetensorsReader:
    """`model.safetensors` of a Hugging Face folder, single or sharded. Raises ValueError naming `flag`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{flag}: there is no folder {folder}")
    for name in ("model.safetensors.index.json", "model.safetensors"):
        if (folder / name).is_file():
            return SafetensorsReader(folder / name)
    raise ValueError(
        f"{flag}: {folder} holds neither model.safetensors nor model.safetensors.index.json (pickled .bin weights are not read). "
        "To start from seeded random weights on purpose, pass --init_random True"
    )


def llm_source(folder: str | Path, arch: BagelArch, extra_rows: Callable[[Entry], torch.Tensor]) -> View:
    """A Qwen2-style folder as BAGEL names.

    A vocabulary larger than the file's is filled from `extra_rows(entry)` (full start value); it is never cut. Where the file ties its
    head to the embedding and this model does not, the head starts as the embedding; where only this model ties them, the file's head is
    not used. Raises ValueError for a file with more vocabulary rows than the model.
    """
    reader = folder_weights(folder, "--llm_path")
    sources = {f"language_model.{name}": name for name in reader.keys()}  # noqa: SIM118
    head = "language_model.lm_head.weight"
    if arch.llm.tie_word_embeddings:
        sources.pop(head, None)
    elif head not in sources and "model.embed_tokens.weight" in reader:
        sources[head] = "model.embed_tokens.weight"
    view, weight_map = View(reader.path), WeightMap(arch)
    for name, there in sources.items():
        entry = weight_map.by_hf.get(name)
        rows = reader.spec(there)[0][:1]
        if entry is None or not entry.vocabulary or rows == entry.shape[:1]:
            view.add(name, reader, there)
        elif rows > entry.shape[:1]:
            raise ValueError(
                f"{reader.path}: {there} has {rows[0]} vocabulary rows, more than the {entry.shape[0]} of this model; a vocabulary is "
                "never cut: leave vocab_size as in the folder's config.json"
            )
        else:
            view.add(name, reader, there, partial(_grow, entry=entry, extra_rows=extra_rows))
    return view


def vit_source(folder: str | Path, arch: BagelArch) -> View:
    """A SigLIP folder as BAGEL names: patch convolution -> linear over (row, column, channel), layers past the selected one dropped."""
    reader = folder_weights(folder, "--vit_path")
    view, dropped = View(reader.path), []
    for there in reader.keys():  # noqa: SIM118
        # transformers 5 saves a vision tower without the prefix that earlier releases and BAGEL use.
        name = there if _SIGLIP_NAMES.match(there) else f"vision_model.{there}"
        layer = _SIGLIP_LAYER.match(name)
        if _SIGLIP_UNUSED.match(name) or (layer and int(layer.group(1)) >= arch.n_vit_layers):
            dropped.append(there)
        elif name.endswith("patch_embedding.weight"):
            view.add(f"vit_model.{name}", reader, there, patch_convolution_to_linear)
        else:
            view.add(f"vit_model.{name}", reader, there)
    if dropped:
        logger.info(
            "%s: %d tensors not used (layers after the %d selected, heads, text tower)", reader.path, len(dropped), arch.n_vit_layers
        )
    return view


def patch_convolution_to_linear(weight: torch.Tensor) -> torch.Tensor:
    """[width, channels, rows, columns] -> [width, rows*columns*channels]; a weight that is linear already is returned."""
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1) if weight.ndim == 4 else weight


def grown_vocabulary(arch: BagelArch, tokens: int) -> BagelArch:
    """`arch` with at least `tokens` vocabulary rows. Rows that pad the vocabulary past the tokenizer are kept, never cut."""
    if tokens <= arch.llm.vocab_size:
        return arch
    logger.info("vocabulary grows from %d to %d rows for the tokenizer", arch.llm.vocab_size, tokens)
    return replace(arch, llm=replace(arch.llm, vocab_size=tokens))


def _grow(tensor: torch.Tensor, entry: Entry, extra_rows: Callable[[Entry], torch.Tensor]) -> torch.Tensor:
    if tensor.is_meta:
        return tensor.new_empty(entry.shape)
    return torch.cat([tensor, extra_rows(entry)[tensor.shape[0] :].to(tensor.dtype)])
