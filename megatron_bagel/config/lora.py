# SPDX-License-Identifier: Apache-2.0
"""Which linears adapters belong to, by names alone, so that model, checkpoints and cost formulas agree.

An adapter is the product of two small matrices that is added to a weight: W + scale * B A, with A [r, in] and B [out, r] (Hu et al. 2021,
https://arxiv.org/abs/2106.09685). Their names are those of the linear with ``lora_A.weight`` and ``lora_B.weight``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_bagel.common.wording import shorten
from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora_arguments import LoraArguments

#: Linears of the decoder's layers by their target, and the part of a layer that an expert must have alone to be adapted alone.
LAYER_TARGETS = {"qkv": "linear_qkv", "proj": "linear_proj", "fc1": "linear_fc1", "fc2": "linear_fc2"}
#: The other linears, as patterns of the weight map's names.
OTHER_TARGETS = {
    "connector": r"connector\.fc[12]",
    "vit": r"vit_model\.vision_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])",
    "vae2llm": r"vae2llm",
    "llm2vae": r"llm2vae",
}
TARGETS = (*LAYER_TARGETS, *OTHER_TARGETS)
#: Beginnings of the names of parts that may train in full. ``und`` and ``gen`` are names inside a layer.
FULL_PARTS = {
    "und": "", "gen": "", "connector": "connector.", "vae2llm": "vae2llm.", "llm2vae": "llm2vae.", "time_embedder": "time_embedder.",
    "embedding": "embedding.", "output_layer": "output_layer.",
}  # fmt: skip
EXPERTS = {"und": ("und",), "gen": ("gen",), "both": ("und", "gen")}
FACTORS = ("lora_A", "lora_B")


def is_factor(name: str) -> bool:
    """Return whether a parameter belongs to an adapter."""
    return any(f".{factor}." in name for factor in FACTORS)


@dataclass(frozen=True)
class LoraSettings:
    """The adapters of a run.

    Attributes:
        rank: The rank of every adapter.
        alpha: The numerator of the scale.
        dropout: The share of inputs that are dropped in training.
        experts: "und", "gen" or "both".
        targets: Names in ``TARGETS``.
        rslora: Whether the scale is alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732) instead of alpha / rank.
        full: Names in ``FULL_PARTS``: what trains beside the adapters.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    experts: str = "both"
    targets: tuple[str, ...] = ("qkv", "proj", "fc1", "fc2")
    rslora: bool = False
    full: tuple[str, ...] = ()

    @property
    def scale(self) -> float:
        """Return the factor of the product B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def adapts_linear(self, expert: str, target: str) -> bool:
        """Return whether ``expert``'s linear ``target`` (a key of ``LAYER_TARGETS``) in a decoder layer has an adapter."""
        return target in self.targets and expert in EXPERTS[self.experts]

    def adapts(self, name: str) -> bool:
        """Return whether the linear ``name`` of the weight map (without ``.weight``) has an adapter."""
        layer = re.fullmatch(r"decoder\.layers\.\d+\.\w+\.(und|gen)\.(linear_\w+)", name)
        if layer is not None:
            return any(linear == layer[2] and self.adapts_linear(layer[1], target) for target, linear in LAYER_TARGETS.items())
        return any(target in self.targets and re.fullmatch(pattern, name) for target, pattern in OTHER_TARGETS.items())

    def trains_in_full(self, name: str) -> bool:
        """Return whether a weight that is no adapter trains too."""
        return any(name.startswith(FULL_PARTS[part]) if FULL_PARTS[part] else f".{part}." in name for part in self.full)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values that ``from_dict`` reads."""
        return asdict(self) | {"targets": list(self.targets), "full": list(self.full)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraSettings:
        """Read what ``to_dict`` returned."""
        return cls(**{**values, "targets": tuple(values["targets"]), "full": tuple(values.get("full", ()))})


def lora_settings(arguments: LoraArguments) -> LoraSettings | None:
    """Return the adapters that the flags describe, or None without ``--lora_rank``. Raises ValueError for names that do not exist."""
    if arguments.lora_rank is None:
        return None
    targets = _words("lora_targets", arguments.lora_targets, TARGETS)
    if not targets:
        raise ValueError(f"--lora_targets is empty; choose from {', '.join(TARGETS)}")
    return LoraSettings(
        rank=arguments.lora_rank,
        alpha=arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha,
        dropout=arguments.lora_dropout,
        experts=arguments.lora_experts,
        targets=targets,
        rslora=arguments.lora_rslora,
        full=_words("lora_full", arguments.lora_full, FULL_PARTS),
    )


def _words(flag: str, given: Sequence[str], known: Sequence[str] | Mapping[str, str]) -> tuple[str, ...]:
    """Return the words of a list with spaces or commas, in the order of ``known``."""
    words = [word for part in given for word in part.split(",") if word]
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(f"--{flag} {shorten(unknown)}: there is no such part; choose from {', '.join(known)}")
    return tuple(word for word in known if word in words)


def check_adapted_parts(lora: LoraSettings, arch: BagelArch) -> None:
    """Check that a model has what its adapters belong to.

    Raises:
        ValueError: A target is in a part that the model lacks, or an expert's linear is shared with the other expert.
    """
    absent = {"vit": arch.vit, "connector": arch.vit, "vae2llm": arch.autoencoder, "llm2vae": arch.autoencoder}
    missing = [target for target in lora.targets if target in absent and absent[target] is None]
    if missing:
        raise ValueError(f"--lora_targets {' '.join(missing)}: this model is built without that part (--visual_und, --visual_gen)")
    layers = range(arch.llm.num_hidden_layers)
    sparse = any(arch.llm.is_sparse(layer, kind) for layer in layers for kind in ("und", "gen"))
    refused = [target for target in lora.targets if sparse and target in ("fc1", "fc2")]
    if refused:
        raise ValueError(
            f"--lora_targets {' '.join(refused)}: the MLPs of this model are sparse experts (--num_experts), which have no adapters; leave "
            "these targets out"
        )
    shared = [target for target in ("qkv", "proj") if not arch.llm.has_gen_attention]
    shared += [target for target in ("fc1", "fc2") if not arch.llm.has_gen_mlp]
    refused = [target for target in lora.targets if target in shared]
    if refused and lora.experts != "both":
        raise ValueError(
            f"--lora_experts {lora.experts}: in {arch.llm.layer_module} both experts share {' and '.join(refused)}, so an adapter changes "
            "both; take --lora_experts both, or leave these out of --lora_targets"
        )
    if {"und", "gen"} & set(lora.full) and not arch.llm.has_gen_attention:
        raise ValueError(f"--lora_full {' '.join(lora.full)}: in {arch.llm.layer_module} the experts share weights; name no expert")
