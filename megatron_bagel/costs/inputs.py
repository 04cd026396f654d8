# SPDX-License-Identifier: Apache-2.0
"""What the cost of a step depends on, in one object for every formula here and in planning/."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.megatron_arguments import MegatronArguments
from megatron_bagel.config.resolve import ResolvedSizes
from megatron_bagel.costs.freezing import FreezeSettings


@dataclass(frozen=True)
class CostInputs:
    """A model, cut and trained in one way. The sizes must have passed ``validate_architecture``.

    Attributes:
        arch: the model.
        megatron: parallel sizes, recomputation and overlap.
        sizes: what these come to on the ranks of the run.
        capacity: tokens that a pack holds at most.
        frozen: what does not train.
    """

    arch: BagelArch
    megatron: MegatronArguments
    sizes: ResolvedSizes
    capacity: int
    frozen: FreezeSettings = field(default_factory=FreezeSettings)
