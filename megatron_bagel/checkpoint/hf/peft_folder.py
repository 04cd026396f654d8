# SPDX-License-Identifier: Apache-2.0
"""Adapters as PEFT stores them: ``adapter_config.json`` and ``adapter_model.safetensors`` under the released names of the weights.

https://huggingface.co/docs/peft/developer_guides/checkpoint describes the files. A third file, ``base.json``, is ours: it says which
weights the adapter belongs to, so that a folder with others is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_bagel.checkpoint.hf.adapter_map import AdapterMap
from megatron_bagel.checkpoint.hf.base_identity import BaseIdentity
from megatron_bagel.checkpoint.hf.safetensors_io import SafetensorsReader, SafetensorsWriter, TensorSpec
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.checkpoint.hf.weight_map import Entry
from megatron_bagel.common.json_files import read_json
from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora import TARGETS, LoraSettings

CONFIG_FILE, WEIGHT_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "base.json"
#: PEFT wraps a model twice.
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class ReleasedAdapter:
    """An adapter by released names.

    Attributes:
        source: Where it was read from, for messages.
        rank: The rank of every pair.
        alpha: The numerator of the scale.
        rslora: Whether the scale is alpha / sqrt(rank).
        factors: A [rank, in] and B [out, rank] by the weight's name with ``.lora_A.weight`` or ``.lora_B.weight`` for ``.weight``.
        base: The weights that it belongs to, if the folder says so.
        dropout: The share of inputs that were dropped in training.
        full: Weights that trained in full, by released names; they replace those of the base.
    """

    source: Path
    rank: int
    alpha: float
    rslora: bool
    factors: Mapping[str, torch.Tensor]
    base: BaseIdentity | None = None
    dropout: float = 0.0
    full: Mapping[str, torch.Tensor] | None = None

    @property
    def scale(self) -> float:
        """Return the factor of the product B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def weights(self) -> list[str]:
        """Return the released names of the weights that change."""
        return [name.removesuffix(_A) + ".weight" for name in self.factors if name.endswith(_A)]

    @property
    def changes(self) -> set[str]:
        """Return the released names of all weights that differ from the base's."""
        return {*self.weights(), *(self.full or {})}

    def changed(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight ``name`` with the adapter merged into it, fp32, or as it is if the adapter does not change it."""
        if self.full is not None and name in self.full:
            return self.full[name]
        stem = name.removesuffix(".weight")
        if not name.endswith(".weight") or stem + _A not in self.factors:
            return weight
        down, up = self.factors[stem + _A].float(), self.factors[stem + _B].float()
        if (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"{self.source}: the adapter of {name} is for {(up.shape[0], down.shape[1])}, the weight has {tuple(weight.shape)}"
            )
        return weight.float() + (up @ down) * self.scale

    def check_names(self, known: Mapping[str, Any]) -> None:
        """Raise ValueError if the adapter changes weights that the model (``WeightMap.by_hf``) does not have."""
        unknown = [name for name in self.weights() if name not in known]
        if unknown:
            raise ValueError(
                f"{self.source} adapts {len(unknown)} weights that this model does not have: {shorten(unknown)}. Names must be those of "
                "the released format, such as language_model.model.layers.0.self_attn.q_proj_moe_gen"
            )

    def settings(self, arch: BagelArch) -> LoraSettings:
        """Return the settings of a run that could train this adapter.

        Raises:
            ValueError: Its weights are not those of any --lora_targets and --lora_experts; it can be merged, but not trained on.
        """
        names = set(self.factors)
        # "both" first: where experts share a linear, it is the only choice.
        for experts in ("both", "und", "gen"):
            everything = LoraSettings(self.rank, self.alpha, self.dropout, experts, TARGETS, self.rslora)
            released = {target: _released(arch, replace(everything, targets=(target,))) for target in TARGETS}
            targets = tuple(target for target, needed in released.items() if needed and needed <= names)
            if targets and set().union(*(released[target] for target in targets)) == names:
                return replace(everything, targets=targets)
        raise ValueError(
            f"{self.source}: the adapted weights are not those of whole --lora_targets ({', '.join(TARGETS)}) in all layers: queries, keys "
            "and values are one linear here, and so are gate and up. The adapter can be merged, but not trained on"
        )


def _released(arch: BagelArch, lora: LoraSettings) -> set[str]:
    return {name for entry in AdapterMap(arch, lora).entries.values() for name in entry.hf}


class MergedSource:
    """A source of tensors (``TensorSource``) with an adapter merged into them, one at a time."""

    def __init__(self, base: TensorSource, adapter: ReleasedAdapter) -> None:
        self._base, self._adapter, self._changed = base, adapter, adapter.changes

    @property
    def path(self) -> object:
        """Where the tensors come from, for messages."""
        return f"{self._base.path} with the adapter {self._adapter.source}"

    def keys(self) -> list[str]:
        """Return all tensor names."""
        return self._base.keys()

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def spec(self, name: str) -> TensorSpec:
        """Return shape and type. A changed weight is fp32, so that it is rounded once, by whoever takes it."""
        shape, dtype = self._base.spec(name)
        return shape, torch.float32 if name in self._changed else dtype

    def origin(self, name: str) -> tuple[SafetensorsReader, str]:
        """Return the reader of the files that hold the tensor without the adapter, and its name there."""
        return self._base.origin(name)

    def get(self, name: str) -> torch.Tensor:
        """Return the tensor, read now, with the adapter merged into it."""
        weight = self._base.get(name)
        return self._adapter.changed(name, weight) if name in self._changed else weight

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Read the tensor now into ``out``, with the adapter merged into it."""
        if name in self._changed:
            out.copy_(self.get(name).reshape(out.shape))
        else:
            self._base.read_into(name, out)

    def get_slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """Return a part of the tensor. A weight that the adapter changes is read whole."""
        if name in self._changed:
            return self.get(name).narrow(dim, start, stop - start)
        return self._base.get_slice(name, dim, start, stop)


def is_peft_folder(path: Path) -> bool:
    """Return whether a folder looks like an adapter of PEFT."""
    return (path / CONFIG_FILE).is_file()


def read_peft_folder(path: Path) -> ReleasedAdapter:
    """Read an adapter. Raises ValueError for one that is not plain LoRA, or is incomplete."""
    config = read_json(path / CONFIG_FILE, "--adapter")
    _refuse_other_kinds(config, path)
    reader = SafetensorsReader(path / WEIGHT_FILE, "full")
    factors = {}
    for name in reader.keys():  # noqa: SIM118
        released = name.removeprefix(_PREFIX)
        if not released.endswith((_A, _B)):
            raise ValueError(f"{path / WEIGHT_FILE}: {name} is no factor of an adapter; only plain LoRA is read")
        factors[released] = reader.get(name)
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    for name, tensor in factors.items():
        twin = name.replace(_A, _B) if name.endswith(_A) else name.replace(_B, _A)
        if twin not in factors:
            raise ValueError(f"{path / WEIGHT_FILE} has {name} but not {twin}: copy it again")
        if tensor.shape[0 if name.endswith(_A) else 1] != rank:
            raise ValueError(f"{path / WEIGHT_FILE}: {name} has shape {tuple(tensor.shape)}, but {CONFIG_FILE} says rank {rank}")
    if not factors:
        raise ValueError(f"{path / WEIGHT_FILE} is empty")
    base = BaseIdentity.from_dict(read_json(path / BASE_FILE, "--adapter")) if (path / BASE_FILE).is_file() else None
    return ReleasedAdapter(path, rank, alpha, bool(config.get("use_rslora")), factors, base, float(config.get("lora_dropout") or 0.0))


def _refuse_other_kinds(config: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError for what is not one rank and one scale for plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind}; only LORA adapters are read")
    refused = {
        "use_dora": config.get("use_dora"),
        "rank_pattern": config.get("rank_pattern"),
        "alpha_pattern": config.get("alpha_pattern"),
        "modules_to_save": config.get("modules_to_save"),
        "bias": config.get("bias", "none") not in ("none", None) and config.get("bias"),
        "fan_in_fan_out": config.get("fan_in_fan_out"),
    }
    given = [name for name, value in refused.items() if value]
    if given:
        raise ValueError(
            f"{path / CONFIG_FILE} sets {', '.join(given)}, which is not read; merge the adapter with PEFT and load the result"
        )


def write_peft_folder(
    out: Path, lora: LoraSettings, entries: Sequence[Entry], released: Mapping[str, torch.Tensor], base: BaseIdentity, dtype: torch.dtype
) -> Path:
    """Write an adapter in PEFT's format.

    Args:
        out: The folder to write; it must be absent or empty.
        lora: The settings of the adapter.
        entries: The entries of its factors.
        released: The factors by released names.
        base: The weights that it belongs to.
        dtype: The type to store.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` holds something, or the run trained parts in full, which this format has no place for here.
    """
    if lora.full:
        raise ValueError(
            f"the run also trained {', '.join(lora.full)} in full (--lora_full), which an adapter's file does not hold: merge the "
            "checkpoint into a model folder instead (megatron-bagel convert adapter merge)"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder; choose another output or remove it")
    out.mkdir(parents=True, exist_ok=True)
    names = [name for entry in entries for name in entry.hf]
    specs: dict[str, TensorSpec] = {_PREFIX + name: (tuple(released[name].shape), dtype) for name in names}
    with SafetensorsWriter(out / WEIGHT_FILE, specs) as writer:
        for name in names:
            writer.write(_PREFIX + name, released[name])
    modules = sorted({name.removesuffix(_A) for name in names if name.endswith(_A)})
    (out / CONFIG_FILE).write_text(json.dumps(_peft_config(lora, modules, base), indent=2), encoding="utf-8")
    (out / BASE_FILE).write_text(json.dumps(base.to_dict(), indent=2), encoding="utf-8")
    return out


def _peft_config(lora: LoraSettings, modules: Sequence[str], base: BaseIdentity) -> dict[str, Any]:
    # Full names of modules: the last parts of names, such as q_proj, exist in the decoder and in the vision tower.
    return {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base.folder, "inference_mode": True, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora, "use_dora": False, "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "target_modules": list(modules),
    }  # fmt: skip
