# SPDX-License-Identifier: Apache-2.0
"""The factors of adapters under our names and under those of the released model, derived from the weight map's rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from megatron_bagel.checkpoint.hf.load import assign, named_weights
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora import LoraSettings, is_factor

_WEIGHT = ".weight"


class AdapterMap:
    """``entries`` maps our names of factors to entries, and ``bases`` maps the names of adapted weights to the weight map's entries.

    A fused linear of r-ranked parts stacks their A, and fuses their B as it fuses the weights themselves.
    """

    def __init__(self, arch: BagelArch, lora: LoraSettings) -> None:
        self.arch, self.lora = arch, lora
        self.entries: dict[str, Entry] = {}
        self.bases: dict[str, Entry] = {}
        for name, entry in WeightMap(arch).entries.items():
            if name.endswith(_WEIGHT) and lora.adapts(name.removesuffix(_WEIGHT)):
                self.bases[name] = entry
                self.entries |= {factor.name: factor for factor in factors_of(entry, lora.rank)}

    def adapter_entries(self, modules: Iterable[nn.Module]) -> Iterator[tuple[Entry, nn.Parameter]]:
        """Yield each factor's entry with its parameter. Raises ValueError if modules and map disagree."""
        for name, parameter in named_weights(modules).items():
            if is_factor(name):
                if name not in self.entries:
                    raise ValueError(f"the modules have an adapter {name} that the settings of adapters do not name")
                yield self.entries[name], parameter

    def initialise(self, modules: Sequence[nn.Module], seed: int) -> None:
        """Give every factor its seeded first value, which is the same for any parallel sizes. The adapted model is then its base."""
        for entry, parameter in self.adapter_entries(modules):
            assign(parameter, initial_factor(entry, seed), entry)

    def fill(self, modules: Sequence[nn.Module], released: Mapping[str, torch.Tensor]) -> None:
        """Give every factor the values of ``released``, by released names. Raises ValueError naming what is missing."""
        for entry, parameter in self.adapter_entries(modules):
            missing = [name for name in entry.hf if name not in released]
            if missing:
                raise ValueError(f"the adapter lacks {', '.join(missing)}, which --lora_targets and --lora_experts ask for")
            assign(parameter, entry.fuse([released[name] for name in entry.hf]), entry)


def factors_of(entry: Entry, rank: int) -> tuple[Entry, Entry]:
    """Return the entries of A and B of an adapted weight."""
    base, hf = entry.name.removesuffix(_WEIGHT), [name.removesuffix(_WEIGHT) for name in entry.hf]
    down = Entry(
        f"{base}.lora_A.weight", tuple(f"{name}.lora_A.weight" for name in hf), tuple((rank, shape[1]) for shape in entry.hf_shapes),
        "stack" if len(hf) > 1 else "copy", entry.kv_groups,
    )  # fmt: skip
    up_shapes = tuple((shape[0], rank) for shape in entry.hf_shapes)
    return down, Entry(f"{base}.lora_B.weight", tuple(f"{name}.lora_B.weight" for name in hf), up_shapes, entry.op, entry.kv_groups)


def initial_factor(entry: Entry, seed: int) -> torch.Tensor:
    """Return the full fp32 first value of a factor: zero for B, uniform in +-1/sqrt(in) for A, as PEFT initialises them."""
    if ".lora_B." in entry.name:
        return torch.zeros(entry.shape)
    digest = hashlib.sha256(f"{seed}/{entry.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(entry.shape, generator=generator).mul_(2).sub_(1).div_(math.sqrt(entry.shape[-1]))
