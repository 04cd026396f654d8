"""Filling Megatron modules from named tensors, fail closed: every parameter gets a value and every tensor a place, or nothing starts.

A *source* is anything with `keys`, `in`, `spec` and `get` under the released layout's names: a safetensors file, or a view that makes a
Qwen2.5 or SigLIP folder look like one (pretrained.py). Modules may be one pipeline stage, tensor-parallel, wrapped, or the vision tower.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_bagel.checkpoint.hf.safetensors_io import TensorSpec
from megatron_bagel.checkpoint.hf.shard import take_shard
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.common.wording import by_prefix, shorten
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)

_VISION_NAMES = ("vit_model.*", "connector.*", "vit_pos_embed.*")
_GENERATION_NAMES = ("time_embedder.*", "vae2llm.*", "llm2vae.*", "latent_pos_embed.*")


class TensorSource(Protocol):
    """Named tensors in the released layout's names, read one at a time."""

    path: object

    def keys(self) -> list[str]: ...
    def __contains__(self, name: str) -> bool: ...
    def spec(self, name: str) -> TensorSpec: ...
    def get(self, name: str) -> torch.Tensor: ...


@dataclass
class LoadReport:
    """What a load did, in Hugging Face names. `missing` and `left_over` hold only what the caller allowed."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)

    def lines(self, path: object) -> list[str]:
        """Sentences for the log; silence means everything matched."""
        lines = [f"{path}: {len(self.loaded)} tensors loaded"] if self.loaded else []
        if self.missing:
            parts = shorten([f"{prefix} ({count})" for prefix, count in by_prefix(self.missing).items()])
            lines.append(f"{path}: {len(self.missing)} absent tensors start from their initial values: {parts}")
        if self.left_over:
            lines.append(f"{path}: {len(self.left_over)} tensors not used by this model: {shorten(self.left_over)}")
        if self.recomputed:
            lines.append(f"{path}: position tables computed for this run's sizes instead of read: {', '.join(self.recomputed)}")
        return lines


def named_weights(modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters of `modules` under the weight map's names: wrappers' `module.` prefixes gone, layers numbered over the whole model."""
    found: dict[str, nn.Parameter] = {}
    for module in modules:
        layer_number = {
            name: child.layer_number - 1
            for name, child in module.named_modules()
            if re.search(r"(^|\.)decoder\.layers\.\d+$", name) and hasattr(child, "layer_number")
        }
        for name, parameter in module.named_parameters():
            for prefix, number in layer_number.items():
                if name.startswith(prefix + "."):
                    name = prefix.rsplit(".", 1)[0] + f".{number}" + name[len(prefix) :]
                    break
            found[re.sub(r"^(module\.)+", "", name)] = parameter
    return found


def entries_of(modules: Iterable[nn.Module], weight_map: WeightMap) -> Iterator[tuple[Entry, nn.Parameter]]:
    """Each parameter with its entry. Raises ValueError for parameters the map does not know: code and table have drifted apart."""
    parameters = named_weights(modules)
    unknown = sorted(set(parameters) - set(weight_map.entries))
    if unknown:
        raise ValueError(f"the modules have parameters that the weight map does not name: {shorten(unknown)}; add rows to weight_map.ROWS")
    for name, parameter in parameters.items():
        yield weight_map.entries[name], parameter


@torch.no_grad()
def assign(parameter: nn.Parameter, full: torch.Tensor, entry: Entry) -> None:
    """Copy this rank's part of the full tensor `full` (rows beyond its vocabulary: zero) into `parameter`."""
    sharded = getattr(parameter, "tensor_model_parallel", False)
    dim = parameter.partition_dim if sharded else -1
    rank, size = _tensor_parallel_place() if sharded else (0, 1)
    if entry.vocabulary and full.shape[0] < parameter.shape[0] * size:
        padding = full.new_zeros(parameter.shape[0] * size - full.shape[0], *full.shape[1:])
        full = torch.cat([full, padding])
    part = take_shard(full, dim, rank, size, blocks=2 if entry.op == "gate_up" else 1)
    if part.shape != parameter.shape:
        raise ValueError(f"parameter {entry.ours} has shape {tuple(parameter.shape)} on this rank, its tensor gives {tuple(part.shape)}")
    parameter.copy_(part)


def load_weights(
    source: TensorSource,
    weight_map: WeightMap,
    modules: Sequence[nn.Module],
    allow_missing: Sequence[str] = (),
    allow_left_over: Sequence[str] = (),
    absent: Callable[[Entry], torch.Tensor] | None = None,
) -> LoadReport:
    """Fill `modules` from `source`, one parameter at a time.

    `allow_missing`, `allow_left_over`: fnmatch patterns of Hugging Face names. Tensors of parts this run has switched off
    (`visual_und`, `visual_gen`) are left over by choice, and position tables are always computed, never read. `absent` gives the full
    value of a parameter that may be missing and is; without it such a parameter keeps what it has.
    Raises ValueError listing missing and left-over tensors, or naming a tensor of another shape with the flag that decides it.
    """
    report = check_against(source, weight_map, allow_missing, allow_left_over)
    for entry, parameter in entries_of(modules, weight_map):
        if entry.hf[0] in source:
            assign(parameter, entry.fuse([source.get(name) for name in entry.hf]), entry)
            report.loaded += entry.hf
        elif absent is not None:
            assign(parameter, absent(entry), entry)
    for line in report.lines(source.path):
        logger.info(line)
    return report


def check_against(
    source: TensorSource, weight_map: WeightMap, allow_missing: Sequence[str] = (), allow_left_over: Sequence[str] = ()
) -> LoadReport:
    """Compare names and shapes of `source` with the map, reading no data. Parameters and errors are those of `load_weights`."""
    report = LoadReport()
    _check_left_over(source, weight_map, (*allow_left_over, *_switched_off(weight_map.arch)), report)
    report.missing = [name for name in weight_map.by_hf if name not in source]
    refused = [name for name in report.missing if not matches(name, allow_missing)]
    if refused:
        raise ValueError(
            f"{source.path} lacks {len(refused)} tensors this model needs: {shorten(refused)}. Check layer_module, llm_qk_norm, "
            "tie_word_embeddings and the config files beside the weights; to train those from their initial values on purpose, pass "
            "--allow_missing PATTERN"
        )
    for entry in weight_map.entries.values():
        present = [name for name in entry.hf if name in source]
        if len(present) not in (0, len(entry.hf)):
            raise ValueError(f"{source.path} has {', '.join(present)} but not the rest of the fused parameter {entry.ours}: {entry.hf}")
        if present:
            _check_shapes(source, entry)
    return report


def _check_left_over(source: TensorSource, weight_map: WeightMap, allowed: Sequence[str], report: LoadReport) -> None:
    strangers = [name for name in source.keys() if name not in weight_map.by_hf and name not in weight_map.tables]  # noqa: SIM118
    refused = [name for name in strangers if not matches(name, allowed)]
    if refused:
        raise ValueError(
            f"{source.path} holds {len(refused)} tensors that this model has no place for: {shorten(refused)}. Check layer_module, "
            "num_hidden_layers, vit_select_layer and tie_word_embeddings against the folder's config files"
        )
    report.left_over = strangers
    report.recomputed = [name for name in weight_map.tables if name in source]


def _check_shapes(source: TensorSource, entry: Entry) -> None:
    for name, expected in zip(entry.hf, entry.hf_shapes, strict=True):
        shape, _ = source.spec(name)
        if shape == expected:
            continue
        hint = "check the config files beside the weights"
        if entry.vocabulary:
            hint = "the vocabulary differs: vocab_size in llm_config.json must be the number of rows in the file"
        elif "position_embedding" in name:
            hint = "check image_size and patch_size in vit_config.json, and --vit_max_num_patch_per_side"
        elif name.startswith(("vae2llm", "llm2vae")):
            hint = "check --latent_patch_size and the autoencoder's z_channels"
        raise ValueError(f"{source.path}: tensor {name} has shape {shape}, this model needs {expected}; {hint}")


def _switched_off(arch: BagelArch) -> tuple[str, ...]:
    off: tuple[str, ...] = ()
    if arch.vit is None:
        off += _VISION_NAMES
    if arch.autoencoder is None:
        off += _GENERATION_NAMES
    return off


def _tensor_parallel_place() -> tuple[int, int]:
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a Hugging Face name fits one of the shell patterns of `--allow_missing`."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
