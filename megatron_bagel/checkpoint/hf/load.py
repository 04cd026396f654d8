# SPDX-License-Identifier: Apache-2.0
"""Fills Megatron modules from named tensors, fail closed: every parameter needs a value and every tensor a parameter, or nothing starts.

A *source* is anything with ``keys``, ``in``, ``spec`` and ``get`` under the released names: a safetensors file, or a view of a Qwen2.5
or SigLIP folder (pretrained.py). Modules may be one pipeline stage, tensor-parallel, wrapped, or the vision tower.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from megatron.core import parallel_state
from torch import nn

from megatron_bagel.checkpoint.hf.last_reads import LastReads
from megatron_bagel.checkpoint.hf.read_fused import read_fused
from megatron_bagel.checkpoint.hf.reused_memory import ReusedMemory
from megatron_bagel.checkpoint.hf.shard import take_shard
from megatron_bagel.checkpoint.hf.tensor_source import TensorSource
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.common.notices import say_once
from megatron_bagel.common.wording import by_prefix, shorten
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora import is_factor

logger = logging.getLogger(__name__)

_VISION_NAMES = ("vit_model.*", "connector.*", "vit_pos_embed.*")
#: Tensors that are no weights: buffers that are computed here, and optimizer states.
_NO_WEIGHTS = ("*.rotary_emb.inv_freq", "*.embeddings.position_ids", "optimizer.*", "scheduler.*")
_GENERATION_NAMES = ("time_embedder.*", "vae2llm.*", "llm2vae.*", "latent_pos_embed.*")


@dataclass
class LoadReport:
    """The result of a load, in Hugging Face names. ``missing`` and ``unexpected`` hold only what the caller allowed."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    recomputed: list[str] = field(default_factory=list)

    def lines(self, path: object) -> list[str]:
        """Return sentences for the log; only the first if everything matched."""
        sentences = [f"{path}: {len(self.loaded)} tensors loaded"] if self.loaded else []
        if self.missing:
            parts = shorten([f"{prefix} ({count})" for prefix, count in by_prefix(self.missing).items()])
            sentences.append(f"{path}: {len(self.missing)} absent tensors start from their initial values: {parts}")
        if self.unexpected:
            sentences.append(f"{path}: {len(self.unexpected)} tensors not used by this model: {shorten(self.unexpected)}")
        if self.recomputed:
            sentences.append(f"{path}: position tables computed for this run's sizes instead of read: {', '.join(self.recomputed)}")
        return sentences


def named_weights(modules: Iterable[nn.Module]) -> dict[str, nn.Parameter]:
    """Return the parameters of ``modules`` under the weight map's names.

    There are no ``module.`` prefixes. Layers and sparse experts are numbered over the model, not over this rank.
    """
    parameters: dict[str, nn.Parameter] = {}
    for module in modules:
        first_expert = {
            name: child.local_expert_indices[0] for name, child in module.named_modules() if hasattr(child, "local_expert_indices")
        }
        layer_number = {
            name: child.layer_number - 1
            for name, child in module.named_modules()
            if re.search(r"(^|\.)decoder\.layers\.\d+$", name) and hasattr(child, "layer_number")
        }
        for name, parameter in module.named_parameters():
            name = _with_global_expert(name, first_expert)
            for prefix, number in layer_number.items():
                if name.startswith(prefix + "."):
                    name = prefix.rsplit(".", 1)[0] + f".{number}" + name[len(prefix) :]
                    break
            parameters[re.sub(r"^(module\.)+", "", name)] = parameter
    return parameters


_LOCAL_EXPERT = re.compile(r"^(.*)\.experts\.local_experts\.(\d+)\.(.*)$")


def _with_global_expert(name: str, first_expert: Mapping[str, int]) -> str:
    """Return a parameter's name with the number of its expert over all expert-parallel ranks."""
    match = _LOCAL_EXPERT.match(name)
    if match is None:
        return name
    layer, number, rest = match.groups()
    return f"{layer}.experts.local_experts.{first_expert[layer] + int(number)}.{rest}"


def entries_of(modules: Iterable[nn.Module], weight_map: WeightMap) -> Iterator[tuple[Entry, nn.Parameter]]:
    """Yield each entry with its parameter. Raises ValueError for a parameter that the map lacks: code and table then disagree.

    The factors of adapters are left out; ``adapter_map.py`` has their entries.
    """
    parameters = {name: parameter for name, parameter in named_weights(modules).items() if not is_factor(name)}
    unknown = sorted(set(parameters) - set(weight_map.entries))
    if unknown:
        raise ValueError(f"the modules have parameters that the weight map does not name: {shorten(unknown)}; add rows to weight_map.ROWS")
    for name, parameter in parameters.items():
        yield weight_map.entries[name], parameter


@torch.no_grad()
def assign(parameter: nn.Parameter, full: torch.Tensor, entry: Entry) -> None:
    """Copy this rank's part of the full tensor ``full`` into ``parameter``; rows beyond its vocabulary become zero."""
    sharded = getattr(parameter, "tensor_model_parallel", False)
    dim = getattr(parameter, "partition_dim", -1) if sharded else -1
    rank, size = _tensor_parallel_rank_and_size(expert=".local_experts." in entry.name) if sharded else (0, 1)
    if entry.vocabulary and full.shape[0] < parameter.shape[0] * size:
        padding = full.new_zeros(parameter.shape[0] * size - full.shape[0], *full.shape[1:])
        full = torch.cat([full, padding])
    part = take_shard(full, dim, rank, size, blocks=2 if entry.op == "gate_up" else 1)
    if part.shape != parameter.shape:
        raise ValueError(f"parameter {entry.name} has shape {tuple(parameter.shape)} on this rank, its tensor gives {tuple(part.shape)}")
    parameter.copy_(part)


@torch.no_grad()
def _assign_from(source: TensorSource, parameter: nn.Parameter, entry: Entry, memory: ReusedMemory) -> None:
    """Fill ``parameter`` from ``source``. A tensor-parallel rank reads its part of each tensor alone, where the parts lie even."""
    sharded = getattr(parameter, "tensor_model_parallel", False)
    rank, size = _tensor_parallel_rank_and_size(expert=".local_experts." in entry.name) if sharded else (0, 1)
    dim = getattr(parameter, "partition_dim", -1)
    if size == 1 or dim not in (0, 1) or not _reads_parts(entry, dim, size):
        full = read_fused(source, entry, memory)
        assign(parameter, full, entry)
        memory.give_back(full)
        return
    parts = []
    for name, shape in zip(entry.hf, entry.hf_shapes, strict=True):
        length = parameter.shape[0] if entry.vocabulary else shape[dim] // size
        stop = min((rank + 1) * length, shape[dim])
        parts.append(source.get_slice(name, dim, min(rank * length, stop), stop))
    part = replace(entry, kv_groups=max(1, entry.kv_groups // size)).fuse(parts)
    if entry.vocabulary and part.shape[0] < parameter.shape[0]:
        part = torch.cat([part, part.new_zeros(parameter.shape[0] - part.shape[0], *part.shape[1:])])
    if part.shape != parameter.shape:
        raise ValueError(f"parameter {entry.name} has shape {tuple(parameter.shape)} on this rank, its tensor gives {tuple(part.shape)}")
    parameter.copy_(part)


def _reads_parts(entry: Entry, dim: int, size: int) -> bool:
    """Return whether a rank's part of ``entry`` is the same part of each of its tensors."""
    if entry.vocabulary:
        return dim == 0
    if entry.op == "qkv" and entry.kv_groups % size:
        return False  # ranks share key/value heads: a part of the fused tensor holds unequal parts of the three
    return all(shape[dim] % size == 0 for shape in entry.hf_shapes)


def load_weights(
    source: TensorSource,
    weight_map: WeightMap,
    modules: Sequence[nn.Module],
    allow_missing: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    initial_value: Callable[[Entry], torch.Tensor] | None = None,
    forgets: bool = False,
) -> LoadReport:
    """Fill ``modules`` from ``source``, one parameter at a time.

    Tensors of parts that this run has switched off (``visual_und``, ``visual_gen``) are ignored. Position tables are always computed.

    Args:
        source: The tensors.
        weight_map: The map of this model.
        modules: The modules to fill.
        allow_missing: Patterns (fnmatch) of Hugging Face names that ``source`` may lack.
        allow_unexpected: Patterns of tensors that the model may not need.
        initial_value: Returns the full value of a parameter that ``source`` lacks; without it the parameter keeps its value.
        forgets: Whether tensors of large files leave the system's page cache after their last reading. Other processes of this machine
            that read the same files would then read them from the disk.

    Raises:
        ValueError: Listing missing and unexpected tensors, or naming a tensor of another shape with the flag that decides it.
    """
    report = check_against(source, weight_map, allow_missing, allow_unexpected)
    memory, pairs = ReusedMemory(), list(entries_of(modules, weight_map))
    reads = LastReads(source, (name for entry, _ in pairs if entry.hf[0] in source for name in entry.hf)) if forgets else None
    for entry, parameter in pairs:
        if entry.hf[0] in source:
            _assign_from(source, parameter, entry, memory)
            report.loaded += entry.hf
            if reads is not None:
                reads.done(entry.hf)
        elif initial_value is not None:
            assign(parameter, initial_value(entry), entry)
    for line in report.lines(source.path):
        say_once(logger, line)
    return report


def check_against(
    source: TensorSource, weight_map: WeightMap, allow_missing: Sequence[str] = (), allow_unexpected: Sequence[str] = ()
) -> LoadReport:
    """Compare names and shapes of ``source`` with the map. Parameters and errors are those of ``load_weights``.

    Data is read for a stored head of a tied model alone: it must repeat the embedding.
    """
    report = LoadReport()
    patterns = (*allow_unexpected, *_switched_off(weight_map.arch), *_NO_WEIGHTS)
    _check_unexpected(source, weight_map, patterns, report)
    report.missing = [name for name in weight_map.by_hf if name not in source]
    refused = [name for name in report.missing if not matches(name, allow_missing)]
    if refused:
        raise ValueError(
            f"{source.path} lacks {len(refused)} tensors this model needs: {shorten(refused)}. Check layer_module, llm_qk_norm, "
            "tie_word_embeddings and the config files beside the weights. A training run, or an import, may start those from their initial "
            "values on purpose: --allow_missing PATTERN"
        )
    for entry in weight_map.entries.values():
        present = [name for name in entry.hf if name in source]
        if len(present) not in (0, len(entry.hf)):
            raise ValueError(f"{source.path} has {', '.join(present)} but not the rest of the fused parameter {entry.name}: {entry.hf}")
        if present:
            _check_shapes(source, entry)
    _check_copies(source, weight_map)
    return report


def _check_unexpected(source: TensorSource, weight_map: WeightMap, patterns: Sequence[str], report: LoadReport) -> None:
    known = (weight_map.by_hf, weight_map.tables, weight_map.copies)
    unexpected_names = [name for name in source.keys() if not any(name in names for names in known)]  # noqa: SIM118
    refused = [name for name in unexpected_names if not matches(name, patterns)]
    if refused:
        raise ValueError(
            f"{source.path} holds {len(refused)} tensors that this model does not have: {shorten(refused)}. Check layer_module, "
            "num_hidden_layers, vit_select_layer and tie_word_embeddings against the folder's config files"
        )
    report.unexpected = unexpected_names
    report.recomputed = [name for name in weight_map.tables if name in source]


def _check_shapes(source: TensorSource, entry: Entry) -> None:
    for name, expected in zip(entry.hf, entry.hf_shapes, strict=True):
        shape, dtype = source.spec(name)
        if shape == expected:
            if not dtype.is_floating_point:
                raise ValueError(
                    f"{source.path}: tensor {name} holds {str(dtype).removeprefix('torch.')} values: quantized weights are not read; use "
                    "the folder's bf16, fp16 or fp32 weights"
                )
            continue
        hint = "check the config files beside the weights"
        if entry.vocabulary:
            hint = (
                "the vocabulary differs: vocab_size in llm_config.json must be the number of rows in the file, and the run's tokenizer "
                "must not have more tokens. If tokens were added to the tokenizer alone, give the tokenizer that the model was trained "
                "with (--tokenizer_path), or let their rows start from seeded values: --grow_vocabulary True"
            )
        elif "position_embedding" in name:
            hint = "check image_size and patch_size in vit_config.json, and vit_max_num_patch_per_side"
        elif name.startswith(("vae2llm", "llm2vae")):
            hint = "check latent_patch_size and the autoencoder's z_channels"
        raise ValueError(f"{source.path}: tensor {name} has shape {shape}, this model needs {expected}; {hint}")


def _check_copies(source: TensorSource, weight_map: WeightMap) -> None:
    for name, entry in weight_map.copies.items():
        if name in source and entry.hf[0] in source and not torch.equal(source.get(name), source.get(entry.hf[0])):
            raise ValueError(
                f"{source.path}: {name} differs from {entry.hf[0]}, but llm_config.json ties them (tie_word_embeddings). Set "
                "tie_word_embeddings to false in llm_config.json, and give --tie_word_embeddings False to a run"
            )


def _switched_off(arch: BagelArch) -> tuple[str, ...]:
    patterns: tuple[str, ...] = ()
    if arch.vit is None:
        patterns += _VISION_NAMES
    if arch.autoencoder is None:
        patterns += _GENERATION_NAMES
    return patterns


def _tensor_parallel_rank_and_size(expert: bool) -> tuple[int, int]:
    if not parallel_state.model_parallel_is_initialized():
        return 0, 1
    if expert:
        return parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_tensor_parallel_world_size()
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a Hugging Face name matches one of the shell patterns of ``--allow_missing``."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
