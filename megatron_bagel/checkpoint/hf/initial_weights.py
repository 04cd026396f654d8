# SPDX-License-Identifier: Apache-2.0
"""A model's initial weights: those of pretrained folders, and seeded values by parameter name for the others.

Initial values are keyed by (seed, parameter name), not by the order of construction. Any parallel sizes start from the same numbers, and
so does a converter that builds no model.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from megatron_bagel.checkpoint.hf.finite_weights import WeightCheck
from megatron_bagel.checkpoint.hf.load import LoadReport, assign, check_against, entries_of, load_weights
from megatron_bagel.checkpoint.hf.pretrained import View, llm_source, vit_source
from megatron_bagel.checkpoint.hf.weight_map import Entry, WeightMap
from megatron_bagel.config.architecture import BagelArch

logger = logging.getLogger(__name__)


def initial_value(entry: Entry, arch: BagelArch, seed: int) -> torch.Tensor:
    """Return the full fp32 start value of one parameter, a function of (seed, name) alone.

    Norm weights are 1, biases 0, and ``llm2vae`` 0 (the original starts the velocity head at zero). Decoder and embeddings are normal with
    the LLM's ``initializer_range``. Adapters (connector, vae2llm, time embedder) are uniform in +-1/sqrt(fan in), torch's default for a
    Linear. The vision tower is SigLIP's: patch embedding normal with variance 1/fan in, matrices Xavier-uniform. Only its position
    embeddings differ: with SigLIP's variance of 1/width they are a tenth of a patch of one colour, and a small tower hardly ever
    learns positions (docs/small_world.md). They start with variance 1, as large as patches.
    """
    name = entry.name
    if name.startswith("llm2vae") or name.endswith(".bias"):
        return torch.zeros(entry.shape)
    if "norm" in name.split(".")[-2] or "layernorm" in name:
        return torch.ones(entry.shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    fan_in = entry.shape[-1]
    if name.startswith("vit_model.vision_model.embeddings."):
        values = torch.randn(entry.shape, generator=generator)
        return values if "position" in name else values.div_(math.sqrt(fan_in))
    if name.startswith("vit_model."):
        return torch.rand(entry.shape, generator=generator).mul_(2).sub_(1).mul_(math.sqrt(6 / sum(entry.shape)))
    if name.startswith(("connector.", "vae2llm.", "time_embedder.")):
        return torch.rand(entry.shape, generator=generator).mul_(2).sub_(1).div_(math.sqrt(fan_in))
    return torch.randn(entry.shape, generator=generator).mul_(arch.llm.initializer_range)


def initialise(modules: Sequence[nn.Module], weight_map: WeightMap, seed: int) -> None:
    """Give every parameter of ``modules`` its seeded start value, which is the same for any parallel sizes."""
    for entry, parameter in entries_of(modules, weight_map):
        assign(parameter, initial_value(entry, weight_map.arch, seed), entry)


@dataclass(frozen=True)
class InitialWeights:
    """The weights that a run or a converter starts from: ``pretrained`` tensors of folders, and seeded values for the others.

    With ``copy_init_moe`` the generation expert starts as a copy of the understanding one, parameter by parameter.
    """

    arch: BagelArch
    seed: int
    pretrained: View
    optional_patterns: tuple[str, ...]
    copy_init_moe: bool

    @classmethod
    def of(
        cls,
        arch: BagelArch,
        seed: int,
        llm_path: str | Path | None,
        vit_path: str | Path | None,
        allow_missing: Sequence[str] = (),
        copy_init_moe: bool = False,
        check_weights: WeightCheck = "sampled",
    ) -> InitialWeights:
        """Build the weights from folders; a path of None leaves that part at its seeded values.

        Weights that those folders cannot have are seeded: generation expert, adapters, and QK-norm if the LLM has none.

        Raises:
            ValueError: If a folder does not exist or has no weights.
        """
        view = View(" + ".join(str(path) for path in (llm_path, vit_path) if path is not None) or "initial weights")
        optional_patterns = ["*_moe_gen.*", "time_embedder.*", "vae2llm.*", "llm2vae.*", "connector.*", *allow_missing]
        if llm_path is None:
            optional_patterns.append("language_model.*")
        else:
            view.merge(llm_source(llm_path, arch, partial(initial_value, arch=arch, seed=seed), check_weights))
            if not any("q_norm" in name for name in view.keys()):  # noqa: SIM118
                optional_patterns += ["*.q_norm.weight", "*.k_norm.weight"]
        if vit_path is None or arch.vit is None:
            optional_patterns.append("vit_model.*")
        else:
            view.merge(vit_source(vit_path, arch, check_weights))
        weights = cls(arch, seed, view, tuple(optional_patterns), copy_init_moe)
        if copy_init_moe:
            weights._copy_understanding_expert()
        return weights

    def _copy_understanding_expert(self) -> None:
        weight_map = WeightMap(self.arch)
        copied = 0
        for name, entry in weight_map.entries.items():
            # Of two MLPs only one may be sparse; the other has no counterpart then and starts from seeded values.
            twin = weight_map.entries.get(_und(name))
            if twin is not None and twin is not entry and twin.hf[0] in self.pretrained:
                copied += 1
                for gen, und in zip(entry.hf, twin.hf, strict=True):
                    self.pretrained.alias(gen, und)
        # Without a folder there is nothing to copy: both experts get equal seeded values.
        if copied:
            logger.info("copy_init_moe: %d generation weights start as copies of the understanding expert's", copied)

    def seeded(self, entry: Entry) -> torch.Tensor:
        """Return the full start value of a parameter that is in no folder."""
        if self.copy_init_moe:
            entry = replace(entry, name=_und(entry.name))
        return initial_value(entry, self.arch, self.seed)

    def check(self) -> LoadReport:
        """Compare names and shapes of the folders with the model's; parameters and errors are those of ``check_against``."""
        return check_against(self.pretrained, WeightMap(self.arch), self.optional_patterns)

    def fill(self, modules: Sequence[nn.Module], forgets: bool = False) -> LoadReport:
        """Give every parameter of ``modules`` its value, one at a time, for any parallel sizes.

        ``forgets`` and errors are those of ``load_weights``.
        """
        return load_weights(
            self.pretrained, WeightMap(self.arch), modules, allow_missing=self.optional_patterns, initial_value=self.seeded,
            forgets=forgets,
        )  # fmt: skip

    def forget_files(self) -> None:
        """Drop the folders' weight files from the system's page cache if they are large, once every process has read them."""
        for reader in {self.pretrained.origin(name)[0] for name in self.pretrained.keys()}:  # noqa: SIM118
            reader.forget_files()


def _und(name: str) -> str:
    return name.replace(".gen.", ".und.")
