"""Where a model's first weights come from: seeded values by parameter name, then Qwen2.5 and SigLIP folders seen as BAGEL's layout.

Each pretrained folder becomes a *source* (weights.py) under the released names, so one strict loader serves every start. Initial values are
keyed by (seed, parameter name), never by the order of construction: any parallel layout starts from the same numbers.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megatron_bagel.checkpoint.safetensors_io import SafetensorsReader, TensorSpec
from megatron_bagel.checkpoint.weight_map import Entry, WeightMap
from megatron_bagel.checkpoint.weights import LoadReport, TensorSource, assign, entries_of, load_weights
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)

# Parts of a SigLIP checkpoint that BAGEL's vision tower has no use for: pooling head, text tower, contrastive scale.
_SIGLIP_UNUSED = re.compile(r"^(vision_model\.head\.|text_model\.|logit_scale$|logit_bias$|vision_model\.embeddings\.position_ids$)")
_SIGLIP_NAMES = re.compile(r"^(vision_model|text_model)\.|^logit_(scale|bias)$")
_SIGLIP_LAYER = re.compile(r"^vision_model\.encoder\.layers\.(\d+)\.")


def initial_value(entry: Entry, arch: BagelArch, seed: int) -> torch.Tensor:
    """Full fp32 start value of one parameter, a function of (seed, name) alone.

    Norm weights 1, biases 0, `llm2vae` 0 (the original starts the velocity head at zero); decoder and embeddings normal with the LLM's
    `initializer_range`; adapters (connector, vae2llm, time embedder) uniform in +-1/sqrt(fan in), torch's default for a Linear; vision
    tower as SigLIP: embeddings normal with variance 1/width, matrices Xavier-uniform.
    """
    name = entry.ours
    if name.startswith("llm2vae") or name.endswith(".bias"):
        return torch.zeros(entry.shape)
    if "norm" in name.split(".")[-2] or "layernorm" in name:
        return torch.ones(entry.shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    fan_in = entry.shape[-1]
    if name.startswith("vit_model.vision_model.embeddings."):
        return torch.randn(entry.shape, generator=generator) / math.sqrt(fan_in)
    if name.startswith("vit_model."):
        return (torch.rand(entry.shape, generator=generator) * 2 - 1) * math.sqrt(6 / sum(entry.shape))
    if name.startswith(("connector.", "vae2llm.", "time_embedder.")):
        return (torch.rand(entry.shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
    return torch.randn(entry.shape, generator=generator) * arch.llm.initializer_range


def initialise(modules: Sequence[nn.Module], weight_map: WeightMap, seed: int) -> None:
    """Give every parameter of `modules` its seeded start value; the same on any layout."""
    for entry, parameter in entries_of(modules, weight_map):
        assign(parameter, initial_value(entry, weight_map.arch, seed), entry)


class View:
    """A source made of other sources' tensors: released name -> (source, name there, change of the tensor)."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._where: dict[str, tuple[TensorSource, str, Callable[[torch.Tensor], torch.Tensor]]] = {}

    def add(self, name: str, source: TensorSource, there: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> None:
        """Let `name` be `change(source[there])`."""
        self._where[name] = (source, there, change)

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


def load_pretrained(
    modules: Sequence[nn.Module],
    arch: BagelArch,
    seed: int,
    llm_path: str | Path | None,
    vit_path: str | Path | None,
    allow_missing: Sequence[str] = (),
) -> LoadReport:
    """Seeded start values everywhere, then the LLM's and the ViT's pretrained weights over them.

    A path of None leaves that part at its start values. What those folders cannot have keeps its start value: generation expert, adapters,
    and QK-norm where the LLM has none. `copy_init_moe` is a separate step (`weights.copy_und_to_gen`).
    """
    weight_map = WeightMap(arch)
    initialise(modules, weight_map, seed)
    view = View(" + ".join(str(path) for path in (llm_path, vit_path) if path is not None))
    kept = ["*_moe_gen.*", "time_embedder.*", "vae2llm.*", "llm2vae.*", "connector.*", *allow_missing]
    if llm_path is None:
        kept.append("language_model.*")
    else:
        view.merge(llm_source(llm_path, arch, partial(initial_value, arch=arch, seed=seed)))
        if not any("q_norm" in name for name in view.keys()):  # noqa: SIM118
            kept += ["*.q_norm.weight", "*.k_norm.weight"]
    if vit_path is None or arch.vit is None:
        kept.append("vit_model.*")
    else:
        view.merge(vit_source(vit_path, arch))
    return load_weights(view, weight_map, modules, allow_missing=kept)


def _grow(tensor: torch.Tensor, entry: Entry, extra_rows: Callable[[Entry], torch.Tensor]) -> torch.Tensor:
    if tensor.is_meta:
        return tensor.new_empty(entry.shape)
    return torch.cat([tensor, extra_rows(entry)[tensor.shape[0] :].to(tensor.dtype)])
