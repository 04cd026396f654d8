# SPDX-License-Identifier: Apache-2.0
"""The costs of a step from flags, for a run and for a plan."""

from __future__ import annotations

from megatron_bagel.config.architecture import BagelArch
from megatron_bagel.config.lora import lora_settings
from megatron_bagel.config.parser import Config
from megatron_bagel.config.resolve import resolve
from megatron_bagel.config.validate import validate_architecture, validate_settings
from megatron_bagel.costs.freezing import FreezeSettings
from megatron_bagel.costs.inputs import CostInputs


def cost_inputs(config: Config, arch: BagelArch, world_size: int, has_gpu: bool = True) -> CostInputs:
    """Return the inputs of the formulas for memory and work of a step.

    Raises:
        ValueError: for settings that cannot work, with the flag and the values that would.
    """
    validate_settings(config, world_size, has_gpu)
    validate_architecture(config, arch)
    sizes = resolve(config, world_size, has_gpu)
    return CostInputs(arch, config.megatron, sizes, config.data.max_num_tokens, freeze_settings(config))


def freeze_settings(config: Config) -> FreezeSettings:
    """Return the parts that do not train."""
    training = config.training
    return FreezeSettings(training.freeze_llm, training.freeze_vit, training.freeze_und, lora_settings(config.lora))
