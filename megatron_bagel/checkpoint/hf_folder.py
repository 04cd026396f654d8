"""The released folder layout of BAGEL, read and written: config files, weights, autoencoder, tokenizer.

Reading is strict (weights.py). Writing gives exactly the released names, shapes and dtypes, into a temporary folder that gets its name when
it is complete, one tensor at a time.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_bagel.checkpoint.safetensors_io import SafetensorsReader, SafetensorsWriter, TensorSpec
from megatron_bagel.checkpoint.weight_map import WeightMap
from megatron_bagel.config.architecture import AutoencoderArch, BagelArch

logger = logging.getLogger(__name__)

WEIGHT_KINDS = ("ema", "model")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
)
TensorGetter = Callable[[str], torch.Tensor]  # our parameter name -> full tensor
PositionTable = Callable[[int, int], torch.Tensor]  # (channels, side) -> [side*side, channels] fp32


class HFFolder:
    """A model folder in the released layout.

    `arch` comes from the folder's JSON; `overrides` and `llm` are the flags that win over it (see `BagelArch.from_hf_folder`), and
    `autoencoder` describes an autoencoder that no `ae_config.json` describes. Raises ValueError for a folder or file that is not there.
    """

    def __init__(
        self,
        path: str | Path,
        llm: dict[str, Any] | None = None,
        autoencoder: AutoencoderArch | None = None,
        **overrides: Any,
    ) -> None:
        self.path = Path(path)
        self.arch = BagelArch.from_hf_folder(self.path, llm=llm, **overrides)
        if autoencoder is not None and self.arch.autoencoder is not None:
            self.arch = replace(self.arch, autoencoder=autoencoder)

    def available_weights(self) -> list[str]:
        """Which of "ema" and "model" the folder holds."""
        return [kind for kind in WEIGHT_KINDS if self._weight_file(kind).is_file()]

    def weights(self, kind: str = "ema") -> SafetensorsReader:
        """The tensors of `ema.safetensors` or `model.safetensors`, single or sharded with an index."""
        if kind not in WEIGHT_KINDS:
            raise ValueError(f"weights {kind!r} are unknown; choose {' or '.join(WEIGHT_KINDS)}")
        if kind not in self.available_weights():
            there = ", ".join(self.available_weights()) or "none"
            raise ValueError(f"{self.path} has no {kind}.safetensors (nor {kind}.safetensors.index.json); weights there: {there}")
        return SafetensorsReader(self._weight_file(kind))

    def _weight_file(self, kind: str) -> Path:
        index = self.path / f"{kind}.safetensors.index.json"
        return index if index.is_file() else self.path / f"{kind}.safetensors"


def weight_specs(weight_map: WeightMap, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Names, shapes and dtypes of a weight file; the position tables are fp32 whatever `dtype` is, as in the released file."""
    return {name: (shape, torch.float32 if name in weight_map.tables else dtype) for name, shape in weight_map.hf_shapes().items()}


def write_weights(path: str | Path, weight_map: WeightMap, get: TensorGetter, table: PositionTable, dtype: torch.dtype) -> None:
    """Write one weight file. `get` gives the full tensor of one of our names; it is asked for one at a time."""
    with SafetensorsWriter(path, weight_specs(weight_map, dtype)) as writer:
        for name, entry in weight_map.entries.items():
            full = get(name)
            if entry.vocabulary:
                full = full[: entry.shape[0]]  # rows that only pad the vocabulary to a multiple of the tensor-parallel size
            for hf_name, part in zip(entry.hf, entry.split(full), strict=True):
                writer.write(hf_name, part)
        for name, fixed in weight_map.tables.items():
            writer.write(name, table(fixed.width, fixed.side))


def write_folder(
    out: str | Path,
    arch: BagelArch,
    weights: Mapping[str, TensorGetter],
    table: PositionTable,
    tokenizer: str | Path | None = None,
    autoencoder: str | Path | None = None,
    dtype: str = "bf16",
) -> Path:
    """Write a complete folder in the released layout.

    `weights`: "ema" and/or "model" -> getter of full tensors; `table` computes a position table; `tokenizer` is a folder or a
    SentencePiece `.model` file to copy; `autoencoder` a weight file to copy; `dtype` "fp32" or "bf16".
    Raises ValueError when `out` already holds something or a file to copy is absent.
    """
    out = Path(out)
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose {' or '.join(DTYPES)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder; choose another output or remove it")
    partial = out.with_name(out.name + f".partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_configs(partial, arch, dtype)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
        if autoencoder is not None and arch.autoencoder is not None:
            _copy(Path(autoencoder), partial / "ae.safetensors")
        weight_map = WeightMap(arch)
        for kind, get in weights.items():
            write_weights(partial / f"{kind}.safetensors", weight_map, get, table, DTYPES[dtype])
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)
    logger.info("wrote %s (%s, %s)", out, " and ".join(weights), dtype)
    return out


def copy_tokenizer(source: str | Path, out: Path) -> None:
    """Copy a tokenizer (folder, or SentencePiece `.model` file) into the folder `out`."""
    source = Path(source)
    if source.is_file():
        _copy(source, out / "tokenizer.model")
        return
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not names:
        raise ValueError(f"{source} holds no tokenizer files (looked for {', '.join(TOKENIZER_FILES)})")
    for name in names:
        _copy(source / name, out / name)


def _write_configs(out: Path, arch: BagelArch, dtype: str) -> None:
    stored = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    top = arch.to_hf()
    top["llm_config"] = {**top["llm_config"], "torch_dtype": stored}
    _write_json(out / "config.json", top)
    _write_json(out / "llm_config.json", top["llm_config"])
    if arch.vit is not None:
        _write_json(out / "vit_config.json", top["vit_config"])
    if arch.autoencoder is not None and arch.autoencoder != AutoencoderArch():
        _write_json(out / "ae_config.json", arch.autoencoder.to_dict())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise ValueError(f"there is no file {source} to copy into the model folder")
    shutil.copyfile(source, target)
