# SPDX-License-Identifier: Apache-2.0
"""BAGEL's released folder format, read and written: config files, weights, autoencoder, tokenizer.

Reading is strict (load.py). Writing gives exactly the released names, shapes and dtypes, one tensor at a time, into a temporary folder
that is renamed once it is complete.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.checkpoint.hf.model_card import CardFacts, card_text
from megatron_bagel.checkpoint.hf.read_ahead import TensorGetter, read_ahead
from megatron_bagel.checkpoint.hf.reused_memory import ReusedMemory
from megatron_bagel.checkpoint.hf.rotary_tables import rotary_table
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, ShardedWriter, TensorSpec
from megatron_bagel.checkpoint.hf.server_index import write_server_index
from megatron_bagel.checkpoint.hf.serving import SERVER, serving_problems
from megatron_bagel.checkpoint.hf.settings_files import token_ids, write_configs, write_generation_config
from megatron_bagel.checkpoint.hf.weight_map import WeightMap
from megatron_bagel.common.dtypes import SHORT
from megatron_bagel.common.folder_files import TOKENIZER_FILES
from megatron_bagel.common.hub_names import hub_hint
from megatron_bagel.common.safetensors_header import AUTOENCODER_FILE
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch, ConfigSources
from megatron_bagel.config.architecture.weight_files import WEIGHT_KINDS, any_weight_file, describe_absence, named_file, weight_file

logger = logging.getLogger(__name__)

DTYPES = SHORT
_LATENT_TABLE = "latent_pos_embed.pos_embed"
PositionTable = Callable[[int, int], torch.Tensor]  # (channels, side) -> [side*side, channels] fp32


class HFFolder:
    """A model folder in the released format.

    ``arch`` comes from the folder's JSON and tensors. ``overrides`` and ``llm`` are flags that replace its settings (see
    ``BagelArch.from_hf_folder``), and ``autoencoder`` describes an autoencoder without an ``ae_config.json``. ``sources`` completes a
    folder that lacks configs, and chooses a weight file of another name. Raises ValueError for a folder or file that does not exist.
    """

    def __init__(
        self,
        path: str | Path,
        llm: dict[str, Any] | None = None,
        autoencoder: AutoencoderArch | None = None,
        sources: ConfigSources | None = None,
        **overrides: Any,
    ) -> None:
        self.path, self.sources = Path(path), sources or ConfigSources()
        if not self.path.is_dir():
            raise ValueError(f"model folder {path} does not exist{hub_hint(str(path))}")
        if self.sources.weights_name is not None:
            named_file(self.path, self.sources.weights_name)
        elif any_weight_file(self.path) is None:
            self.sources.llm_config(self.path)  # neither weights nor configs: no model folder
        if autoencoder is not None:
            self.sources = replace(self.sources, autoencoder=autoencoder)
        self._llm, self._overrides = llm, overrides

    @cached_property
    def arch(self) -> BagelArch:
        """The model. Its JSON is read here, so that who only wants weights does not read it."""
        return BagelArch.from_hf_folder(self.path, llm=self._llm, sources=self.sources, **self._overrides)

    def available_weights(self) -> list[str]:
        """Return which of "ema" and "model" the folder holds; the kind of its name if ``sources`` names a weight file."""
        return [kind for kind in WEIGHT_KINDS if self._weight_file(kind) is not None]

    def default_weights(self) -> tuple[str]:
        """Return the kind to take if none is asked for: "ema", as in a released folder, or "model" if that is all there is."""
        return ("model",) if self.available_weights() == ["model"] else ("ema",)

    def weights(self, kind: str = "ema", check_weights: WeightCheck = "sampled", read_once: bool = False) -> SafetensorsReader:
        """Open ``ema.safetensors`` or ``model.safetensors``, single or sharded with an index; the rest is for reading tensors."""
        if kind not in WEIGHT_KINDS:
            raise ValueError(f"weights {kind!r} are unknown; choose {' or '.join(WEIGHT_KINDS)}")
        file = self._weight_file(kind)
        if file is None:
            kinds = ", ".join(self.available_weights()) or "none"
            raise ValueError(
                f"{describe_absence(self.path, kind)}; weights there: {kinds}. A converter takes "
                "others with --weights, and training takes ema weights only with --finetune_from_ema True"
            )
        return SafetensorsReader(file, check_weights, read_once)

    def stored_latent_size(self, kind: str) -> int | None:
        """Return the ``max_latent_size`` that the weights ``kind`` were trained with, by their position table, or None without one."""
        source = self.weights(kind)
        return math.isqrt(source.spec(_LATENT_TABLE)[0][0]) if _LATENT_TABLE in source else None

    def _weight_file(self, kind: str) -> Path | None:
        return weight_file(self.path, kind, self.sources.weights_name)


@dataclass(frozen=True)
class WeightFile:
    """A weight file to write. ``get`` returns the full tensor of one of our names, one at a time.

    ``dtype`` is "bf16", "fp32" or "keep"; with "keep", ``stored_type`` returns the type of each name. ``get`` may take the memory of its
    tensors from ``memory``.
    """

    get: TensorGetter
    dtype: str = "bf16"
    stored_type: Callable[[str], torch.dtype] | None = None
    memory: ReusedMemory = field(default_factory=ReusedMemory)

    def __post_init__(self) -> None:
        choices = (*DTYPES, *(["keep"] if self.stored_type is not None else []))
        if self.dtype not in choices:
            raise ValueError(f"dtype {self.dtype!r} is unknown; choose {' or '.join(choices)}")

    def specs(self, weight_map: WeightMap) -> dict[str, TensorSpec]:
        """Return names, shapes and dtypes. The tables of positions are always fp32, as in the released file."""
        specs: dict[str, TensorSpec] = {}
        for name, entry in weight_map.entries.items():
            dtype = DTYPES[self.dtype] if self.stored_type is None or self.dtype != "keep" else self.stored_type(name)
            specs |= {hf: (shape, dtype) for hf, shape in zip(entry.hf, entry.hf_shapes, strict=True)}
        specs |= {name: specs[entry.hf[0]] for name, entry in weight_map.copies.items()}
        return specs | {name: (table.shape, torch.float32) for name, table in weight_map.tables.items()}

    def bytes(self, weight_map: WeightMap) -> int:
        """Return the size of the tensors in bytes."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.specs(weight_map).values())


def write_weights(path: Path, weight_map: WeightMap, file: WeightFile, table: PositionTable, shard_bytes: int | None = None) -> None:
    """Write one weight file in the order of the weight map, or with ``shard_bytes`` several files and their index.

    A tensor larger than ``shard_bytes`` gets a separate file.
    """
    specs = file.specs(weight_map)
    names = list(weight_map.entries)
    with read_ahead(file.get, names) as get, ShardedWriter(path, specs, shard_bytes) as writer:
        for name in tqdm(names, unit="tensor", desc=path.name, mininterval=1.0, disable=None):
            entry, tensor = weight_map.entries[name], get(name)
            # Rows that pad the vocabulary for the tensor-parallel size are dropped.
            for hf_name, part in zip(entry.hf, entry.parts(tensor[: entry.shape[0]] if entry.vocabulary else tensor), strict=True):
                writer.write(hf_name, part)
            file.memory.give_back(tensor)
        for name, entry in weight_map.copies.items():
            writer.write(name, file.get(entry.name)[: entry.shape[0]])
        for name, fixed in weight_map.tables.items():
            writer.write(name, rotary_table(fixed) if fixed.rotary else table(fixed.width, fixed.side))


def write_folder(
    out: str | Path,
    arch: BagelArch,
    weights: Mapping[str, WeightFile],
    table: PositionTable,
    tokenizer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    shard_bytes: int | None = None,
    facts: CardFacts | None = None,
) -> Path:
    """Write a complete folder in the released format.

    Args:
        out: The folder to write; it must be absent or empty.
        arch: The model.
        weights: What to write as "ema" and/or "model".
        table: Computes a position table.
        tokenizer: A folder or a SentencePiece ``.model`` file to copy.
        autoencoder: A weight file to copy.
        shard_bytes: The largest size of one weight file.
        facts: What the model card says of the run.

    Returns:
        ``out``.

    Raises:
        ValueError: If ``out`` holds something, cannot be written, or a file to copy does not exist.
    """
    out = Path(out)
    with _new_folder(out) as partial:
        write_configs(partial, arch, _stated_type(weights))
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
            write_generation_config(partial)
        if autoencoder is not None and arch.autoencoder is not None:
            _copy(Path(autoencoder), partial / AUTOENCODER_FILE)
        problems = serving_problems(arch, weights, token_ids(partial))
        (partial / "README.md").write_text(card_text(arch, weights, problems, facts or CardFacts()), encoding="utf-8")
        weight_map = WeightMap(arch)
        for kind, content in weights.items():
            write_weights(partial / f"{kind}.safetensors", weight_map, content, table, shard_bytes)
        if len(weights) == 1:
            [kind] = weights
            if (file := weight_file(partial, kind)) is not None:
                write_server_index(partial, file)
    logger.info("wrote %s (%s)", out, " and ".join(weights))
    if problems:
        logger.info("%s cannot serve this folder: %s", SERVER, "; ".join(problems))
    return out


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes ``out`` when the block ends without an error, and is removed otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder; choose another output or remove it")
    partial = out.with_name(out.name + f".partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise ValueError(f"cannot write the model folder {out}: {error}") from error
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def copy_tokenizer(source: str | Path, out: Path) -> None:
    """Copy a tokenizer (folder, or SentencePiece ``.model`` file) into the folder ``out``."""
    source = Path(source)
    if source.is_file():
        _copy(source, out / "tokenizer.model")
        return
    if not source.is_dir():
        raise ValueError(f"there is no tokenizer at {source}; say where it is with --tokenizer")
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not names:
        raise ValueError(f"{source} holds no tokenizer files (looked for {', '.join(TOKENIZER_FILES)})")
    for name in names:
        _copy(source / name, out / name)


def _stated_type(weights: Mapping[str, WeightFile]) -> str:
    """Return the type that the configs state: with "keep" the smallest one. Loaders of the folder choose their type themselves."""
    return "float32" if weights and all(file.dtype == "fp32" for file in weights.values()) else "bfloat16"


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ValueError(f"there is no file {source} to copy into the model folder")
    shutil.copyfile(source, target)
